"""Tiny runs of every trainer on the CPU, with and without plugins, and what they leave behind."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import trl
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import trl_ext
from trl_ext.gradients import whole_tensor
from trl_ext.hookspecs import REWARDED
from trl_ext.testing.models import save_model, tiny_llama, tiny_reward_model
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
    return start_model("sft", **options)


def start_model(kind: str, **options: Any) -> Any:
    """A tiny model for a trainer of a kind, with a score in place of the LM head for reward models."""
    return (tiny_reward_model if kind == "reward" else tiny_llama)(**{"hidden": 16, "layers": 1, **options})


def additions(size: int = 64, kind: Kind = "prompt_completion", **options: Any) -> Any:
    """Sums of numbers of up to two digits, as a data set in one of TRL's formats; see `Task.dataset`."""
    return Addition(digits=2).dataset(size, kind, **options)


def lora(kind: str = "sft") -> Any:
    """A LoRA of rank 2 on queries and values, for the model of a trainer."""
    from peft import LoraConfig  # of the extra `peft`

    task = "SEQ_CLS" if kind == "reward" else "CAUSAL_LM"
    return LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type=task)


def preferences(size: int = 64, **options: Any) -> Any:
    """Sums as pairs of completions, for DPO and reward models: the right one is chosen, a wrong one rejected."""
    right, wrong = additions(size, **options), additions(size, noise=1.0, **options)
    chosen = right.rename_column("completion", "chosen").select_columns(["prompt", "chosen"])
    return chosen.add_column("rejected", wrong["completion"])


def judged(size: int = 64, **options: Any) -> Any:
    """Sums half of which are wrong, for KTO: each with a label that says which."""
    rows = additions(size, noise=0.5, **options)
    labels = [not wrong for wrong in rows["corrupted"]]
    return rows.select_columns(["prompt", "completion"]).add_column("label", labels)


@dataclass(frozen=True)
class _Kind:
    """What a trainer needs beside a model, a tokenizer and a config."""

    name: str
    """Of its classes in TRL, before `Trainer` and `Config`."""
    data: Callable[..., Any]
    """Gives rows: their number, and a seed."""
    size: int = 64
    """Rows of a training set."""
    config: Mapping[str, Any] = field(default_factory=dict)
    arguments: Callable[[], Mapping[str, Any]] = dict
    """Of its constructor."""
    loads: bool = True
    """Whether TRL loads a reference from the model's folder."""


def _prompts(size: int, seed: int = 0) -> Any:
    return additions(size, "prompt_only", seed=seed)


_SAMPLING = {"max_completion_length": 5}
_KINDS: dict[str, _Kind] = {
    "sft": _Kind("SFT", additions, loads=False),
    "grpo": _Kind("GRPO", _prompts, 32, {"num_generations": 2, **_SAMPLING}),
    "dpo": _Kind("DPO", preferences),
    "kto": _Kind("KTO", judged),
    "rloo": _Kind("RLOO", _prompts, 32, {"num_generations": 2, **_SAMPLING}),
    "reward": _Kind("Reward", preferences, loads=False),
    "distillation": _Kind(
        "Distillation",
        _prompts,
        32,
        _SAMPLING,
        arguments=lambda: {"teacher_model": tiny_model(seed=1, initializer_range=0.5)},  # one that tells tokens apart
        loads=False,
    ),
}


def rows(kind: str, size: int = 0, seed: int = 0) -> Any:
    """Data for a trainer of a kind; as many rows as its training set has, where no number is given."""
    of = _KINDS[kind]
    return of.data(size or of.size, seed=seed)


def make(
    kind: str,
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
    """A trainer of a kind, TRL's own where `plain`.

    `config` and, as its `plugins`, `names` go into the config, `trainer` goes to the constructor. The model is also
    saved, into `saved` or beside the run's folder, where TRL loads the reference from there.
    """
    _freeze_imports()
    torch.manual_seed(0)
    of, library = _KINDS[kind], trl if plain else trl_ext
    ours = {} if plain else {"plugins": list(plugins), "streams": streams}
    model = start_model(kind) if model is None else model
    if of.loads or saved is not None:
        save_model(model, tokenizer(), saved or Path(folder).parent / "model")
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # the first rank saves
    config = {**COMMON, "max_steps": 4, **of.config, **config} | ({"plugins": names} if names else {})
    given = dict(of.arguments()) | ({"reward_funcs": reward or varied_reward} if kind in REWARDED else {})
    return getattr(library, f"{of.name}Trainer")(
        model=model,
        args=getattr(library, f"{of.name}Config")(str(folder), **config),
        train_dataset=rows(kind) if train is None else train,
        processing_class=tokenizer(),
        **{**given, **(trainer or {}), **ours},
    )


@functools.cache
def _freeze_imports() -> None:
    """Leave what TRL's imports have made to no collection of garbage: each training has one, longer than its steps."""
    gc.freeze()


make_sft = functools.partial(make, "sft")
make_grpo = functools.partial(make, "grpo")


def varied_reward(completions: list[str], **columns: Any) -> list[float]:
    """A reward that differs within groups even for an untrained model: the share of digits, and the length."""
    return [sum(c.isdigit() for c in text) + len(text.encode()) / 7 for text in completions]


MAKE: dict[str, Callable[..., Any]] = {kind: functools.partial(make, kind) for kind in _KINDS}
"""How to make a tiny run, by trainer."""


def parameters(trainer: Any) -> dict[str, Tensor]:
    """Copies of all parameters, trainable or not; whole ones where each rank holds a shard."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: whole_tensor(p.detach()).clone() for name, p in model.named_parameters()}


def moved(trainer: Any, start: Mapping[str, Tensor]) -> float:
    """Largest change of a parameter: guards comparisons against runs that did not train."""
    return max(float((p - start[name]).abs().max()) for name, p in parameters(trainer).items())


def logged(trainer: Any, *without: str) -> list[dict[str, Any]]:
    """What was logged, without timings and the given keys."""
    return [without_timing(entry, without) for entry in trainer.state.log_history]


def without_timing(logs: Mapping[str, Any], without: Iterable[str] = ()) -> dict[str, Any]:
    """An entry of the log without timings and the given keys."""
    return {k: v for k, v in logs.items() if not k.endswith(TIMING) and k not in without}
