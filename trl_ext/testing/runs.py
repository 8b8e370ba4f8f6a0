"""Tiny SFT and GRPO runs on the CPU, with and without plugins, and what they leave behind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import trl
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerFast

import trl_ext
from trl_ext.testing.models import save_model, tiny_llama
from trl_ext.testing.tasks import Addition, Kind
from trl_ext.testing.tokenizers import tiny_tokenizer

COMMON = {
    "bf16": False,  # TRL's default is True, also on CPU
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "activation_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-2,  # large, so that a wrong gradient shows within a few steps
    "seed": 7,
}
"""Settings of every run, beside those that it is given."""

TIMING = ("runtime", "per_second", "step_time", "preparation_time")
"""Endings of the names of logged numbers that differ from run to run."""


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer that all runs share."""
    return tiny_tokenizer()


def tiny_model(**options: Any) -> Any:
    """One layer of width 16: 30 steps take a fifth of a second."""
    return tiny_llama(**{"hidden": 16, "layers": 1, **options})


def additions(size: int = 64, kind: Kind = "prompt_completion", **options: Any) -> Any:
    """Sums of numbers of up to two digits, as a data set in one of TRL's formats; see `Task.dataset`."""
    return Addition(digits=2).dataset(size, kind, **options)


def lora() -> Any:
    """A LoRA of rank 2 on queries and values."""
    from peft import LoraConfig  # of the extra `peft`

    return LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def make_sft(
    folder: Path | str,
    *,
    plain: bool = False,
    model: Any = None,
    train: Any = None,
    trainer: Mapping[str, Any] | None = None,
    names: list[Any] | None = None,
    plugins: Iterable[Any] = (),
    streams: Mapping[str, Any] | None = None,
    **config: Any,
) -> Any:
    """An SFT trainer, TRL's own where `plain`.

    `config` and, as its `plugins`, `names` go into the config, `trainer` goes to the constructor.
    """
    torch.manual_seed(0)
    library = trl if plain else trl_ext
    ours = {} if plain else {"plugins": list(plugins), "streams": streams}
    config = {**COMMON, "max_steps": 4, **config} | ({"plugins": names} if names else {})
    return library.SFTTrainer(
        model=tiny_model() if model is None else model,
        args=library.SFTConfig(str(folder), **config),
        train_dataset=additions() if train is None else train,
        processing_class=tokenizer(),
        **(trainer or {}),
        **ours,
    )


def make_grpo(
    folder: Path | str,
    *,
    plain: bool = False,
    model: Any = None,
    train: Any = None,
    reward: Any = None,
    saved: Path | None = None,
    trainer: Mapping[str, Any] | None = None,
    names: list[Any] | None = None,
    plugins: Iterable[Any] = (),
    streams: Mapping[str, Any] | None = None,
    **config: Any,
) -> Any:
    """A GRPO trainer, TRL's own where `plain`. The model is also saved: TRL loads the reference from there."""
    torch.manual_seed(0)
    library = trl if plain else trl_ext
    ours = {} if plain else {"plugins": list(plugins), "streams": streams}
    model = tiny_model() if model is None else model
    save_model(model, tokenizer(), saved or Path(folder).parent / "model")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # the first rank saves
    config = {**COMMON, "max_steps": 4, "num_generations": 2, "max_completion_length": 5, **config}
    config |= {"plugins": names} if names else {}
    return library.GRPOTrainer(
        model=model,
        reward_funcs=varied_reward if reward is None else reward,
        args=library.GRPOConfig(str(folder), **config),
        train_dataset=additions(32, "prompt_only") if train is None else train,
        processing_class=tokenizer(),
        **(trainer or {}),
        **ours,
    )


def varied_reward(completions: list[str], **columns: Any) -> list[float]:
    """A reward that differs within groups even for an untrained model: the share of digits, and the length."""
    return [sum(c.isdigit() for c in text) + len(text.encode()) / 7 for text in completions]


MAKE: dict[str, Callable[..., Any]] = {"sft": make_sft, "grpo": make_grpo}
"""How to make a tiny run, by trainer."""


def parameters(trainer: Any) -> dict[str, Tensor]:
    """Copies of all parameters, trainable or not; whole ones where each rank holds a shard."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: whole(p.detach()).clone() for name, p in model.named_parameters()}


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from its shards. Collective where there are any."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def moved(trainer: Any, start: Mapping[str, Tensor]) -> float:
    """Largest change of a parameter: guards comparisons against runs that did not train."""
    return max(float((p - start[name]).abs().max()) for name, p in parameters(trainer).items())


def logged(trainer: Any, *without: str) -> list[dict[str, Any]]:
    """What was logged, without timings and the given keys."""
    return [without_timing(entry, without) for entry in trainer.state.log_history]


def without_timing(logs: Mapping[str, Any], without: Iterable[str] = ()) -> dict[str, Any]:
    """An entry of the log without timings and the given keys."""
    return {k: v for k, v in logs.items() if not k.endswith(TIMING) and k not in without}
