"""Tiny GRPO runs in fp64, with a plugin that records both gradients and the weights of every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor

from trl_ext import GRPOConfig, GRPOTrainer, hookimpl
from trl_ext.gradients import GradientView
from trl_ext.records import Rewards, Rollouts, SetupContext, StreamGradient, WeightsView
from trl_ext.testing import Addition, tiny_llama, tiny_tokenizer

TASK = Addition(digits=2)
Vector = list[Tensor]
EXACT = 1e-10
"""Gradients of two ways to write one loss in fp64, through a head that TRL evaluates in tiles."""


def checksum_reward(completions: Sequence[str], **columns: Any) -> list[float]:
    """A reward that a random model gets at many values, so that groups carry a signal from the first step."""
    return [sum(map(ord, c)) % 7 / 6 for c in completions]


def constant_reward(completions: Sequence[str], **columns: Any) -> list[float]:
    return [0.3 for _ in completions]


@dataclass(eq=False)
class Recorder:
    """Keeps what every step saw: put it first to see the gradients as the methods receive them."""

    rl: list[Vector] = field(default_factory=list)
    sft: list[Vector] = field(default_factory=list)
    weights: list[Vector] = field(default_factory=list)

    requires_api: ClassVar[str] = "1"
    citation: ClassVar[str] = "test"

    @hookimpl
    def setup(self, context: SetupContext) -> None:
        self.weights.append([t.clone() for t in context.weights.local()])

    @hookimpl
    def gradients_ready(self, gradients: GradientView, streams: Mapping[str, StreamGradient]) -> None:
        self.rl.append(vector(gradients))
        if "sft" in streams:
            self.sft.append(vector(streams["sft"].gradients))

    @hookimpl
    def weights_updated(self, weights: WeightsView, step: int, skipped: bool) -> None:
        self.weights.append([t.clone() for t in weights.local()])


@dataclass(eq=False)
class Late(Recorder):
    """A recorder for the last place."""


@dataclass(eq=False)
class Rolled:
    """Keeps the generation batches; before a method it sees TRL's advantages, after it the method's."""

    batches: list[tuple[Rollouts, Rewards, Tensor]] = field(default_factory=list)

    requires_api = "1"
    citation = "test"

    @hookimpl
    def advantages(self, rollouts: Rollouts, rewards: Rewards, advantages: Tensor) -> Tensor:
        self.batches.append((rollouts, rewards, advantages.clone()))
        return advantages


def mixed_reward(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """The even prompts are solved now and then, the odd ones never."""
    return [
        float(ord(c[0]) % 2) if c and len(p) and hash_of(p) % 2 == 0 else 0.0
        for p, c in zip(prompts, completions, strict=True)
    ]


def never(completions: Sequence[str], **columns: Any) -> list[float]:
    """Differs within groups, and never reaches 1."""
    return [0.9 * r for r in checksum_reward(completions)]


def hash_of(prompt: str) -> int:
    return sum(map(ord, prompt))


def vector(view: GradientView) -> Vector:
    return [torch.zeros_like(p) if g is None else g.clone() for p, g in zip(view.parameters, view.tensors, strict=True)]


def prompts(size: int = 16) -> Dataset:
    return TASK.dataset(size, "prompt_only")


def demonstrations(size: int = 12) -> Dataset:
    return TASK.dataset(size, "prompt_completion", seed=1)


def stopping_model() -> Any:
    """A model whose completions end at many tokens, so that they have different lengths."""
    model = tiny_llama(hidden=16).double()
    model.generation_config.eos_token_id = [*range(0, 256, 6), tiny_tokenizer().eos_token_id]
    return model


SETTINGS: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


def grpo(
    output_dir: Path,
    plugins: list[Any],
    *,
    recorder: Recorder | None = None,
    make: Any = GRPOTrainer,
    config: Any = GRPOConfig,
    reward: Any = checksum_reward,
    dtype: torch.dtype = torch.float64,
    stream: Dataset | None = None,
    data: Dataset | None = None,
    eval_data: Dataset | None = None,
    model: Any = None,
    **settings: Any,
) -> Any:
    """A trainer of a few steps at a rate that moves the weights visibly. The recorder comes before plugin instances."""
    ours = {}
    if make is GRPOTrainer:
        named = [plugin for plugin in plugins if isinstance(plugin, str)]
        ours = {"plugins": [*([recorder] if recorder else []), *(p for p in plugins if p not in named)]}
        ours["streams"] = {"sft": demonstrations() if stream is None else stream} if stream is not False else {}
        settings["plugins"] = named
    return make(
        tiny_llama(hidden=16).to(dtype) if model is None else model,
        reward_funcs=reward,
        args=config(str(output_dir), **{**SETTINGS, **settings}),
        train_dataset=prompts() if data is None else data,
        eval_dataset=eval_data,
        processing_class=tiny_tokenizer(),
        **ours,
    )
