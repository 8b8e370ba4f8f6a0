"""Tiny SFT and GRPO runs, with and without plugins, and exact comparisons of what they leave behind."""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import datasets
import torch
import trl
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import trl_ext
from trl_ext import hookimpl
from trl_ext.records import TokenRecord
from trl_ext.testing import Addition, save_model, tiny_llama, tiny_tokenizer

datasets.disable_progress_bars()
# Every `train()` collects garbage, which takes longer than the steps while it goes through all of these imports.
gc.freeze()

# A file's pickled config class differs by design; the others must not.
PICKLED_CONFIG = "training_args.bin"
TIMING = ("runtime", "per_second", "step_time", "preparation_time")

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


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def tiny_model(**options: Any) -> Any:
    """One layer of width 16: 30 steps take a fifth of a second."""
    return tiny_llama(**{"hidden": 16, "layers": 1, **options})


def additions(size: int = 64, kind: str = "prompt_completion", **options: Any) -> Any:
    return Addition(digits=2).dataset(size, kind, **options)


def lora() -> LoraConfig:
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


def parameters(trainer: Any) -> dict[str, Tensor]:
    """Copies of all parameters, trainable or not."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal_bits(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert list(mine) == list(theirs)
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert not different, f"{len(different)} of {len(mine)} tensors differ, first {different[0]}"


def assert_close(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], rtol: float, atol: float) -> None:
    assert list(mine) == list(theirs)
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def moved(trainer: Any, start: Mapping[str, Tensor]) -> float:
    """Largest change of a parameter: guards comparisons against runs that did not train."""
    return max(float((p - start[name]).abs().max()) for name, p in parameters(trainer).items())


def logged(trainer: Any, *without: str) -> list[dict[str, Any]]:
    """What was logged, without timings and the given keys."""
    return [without_timing(entry, without) for entry in trainer.state.log_history]


def without_timing(logs: Mapping[str, Any], without: Iterable[str] = ()) -> dict[str, Any]:
    return {k: v for k, v in logs.items() if not k.endswith(TIMING) and k not in without}


def file_digests(folder: Path) -> dict[str, str]:
    """Every file below a folder by its relative path, with its content's hash; timings in JSON left out."""
    digests = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.name == PICKLED_CONFIG:
            continue
        content = path.read_bytes()
        if path.name == "trainer_state.json":
            state = json.loads(content)
            state["log_history"] = [without_timing(entry) for entry in state["log_history"]]
            # It holds the folder of the run.
            state["best_model_checkpoint"] = os.path.basename(state["best_model_checkpoint"] or "")
            content = json.dumps(state).encode()
        if path.name == "manifest.json":  # the checksums of what is left out here differ too
            manifest = json.loads(content)
            del manifest["checksum"]
            for name in (PICKLED_CONFIG, "trainer_state.json"):
                del manifest["files"][name]
            content = json.dumps(manifest).encode()
        digests[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return digests


# -- plugins that tests share ----------------------------------------------------------------------------------------


@dataclass(eq=False)
class Plugin:
    """Base of test plugins."""

    requires_api: ClassVar[str] = "1"


@dataclass(eq=False)
class Nll(Plugin):
    """The objective that plain TRL has."""

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        return -tokens.log_probs


@dataclass(eq=False)
class Idle(Plugin):
    """Active, and without effect."""

    @hookimpl
    def metrics(self, mode: str) -> dict[str, float]:
        return {}
