"""Tiny GRPO runs whose completions have different lengths, and what their hooks saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from trl_ext import hookimpl
from trl_ext.records import Rewards, Rollouts
from trl_ext.testing.runs import make_grpo, tiny_model, tokenizer


def checksum_reward(completions: Sequence[str], **columns: Any) -> list[float]:
    """A reward that an untrained model gets at many values, so that groups carry a signal from the first step."""
    return [sum(map(ord, c)) % 7 / 6 for c in completions]


def binary_reward(completions: Sequence[str], **columns: Any) -> list[float]:
    """Right or wrong by the completion's letters."""
    return [float(sum(map(ord, c)) % 3 == 0) for c in completions]


def stopping_model(sharpness: float = 1.0) -> Any:
    """Its completions end now and then, so that lengths differ; with more sharpness entropies do too."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight *= sharpness
        model.lm_head.weight[tokenizer().eos_token_id] *= 8
    return model


@dataclass(eq=False)
class Seen:
    """Keeps the rollouts, rewards and advantages of every generation batch."""

    requires_api: ClassVar[str] = "1"
    label: str = "seen"

    def __post_init__(self) -> None:
        self.batches: list[tuple[Rollouts, Rewards, Tensor]] = []

    @hookimpl
    def advantages(self, rollouts: Rollouts, rewards: Rewards, advantages: Tensor) -> Tensor:
        self.batches.append((rollouts, rewards, advantages.clone()))
        return advantages


def grpo(folder: Path, plugins: Sequence[Any] = (), **settings: Any) -> Any:
    """Two groups of four and three steps of SGD, which keeps rounding small."""
    common: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 3,
        "optim": "sgd",
        "learning_rate": 0.2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "reward": checksum_reward,
        "model": stopping_model(),
    }
    return make_grpo(folder, plugins=plugins, **{**common, **settings})
