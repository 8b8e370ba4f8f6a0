"""Tiny SFT runs whose raw weights are recorded after every step by a plugin of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor

from trl_ext import SFTConfig, SFTTrainer, hookimpl
from trl_ext.records import SetupContext, WeightsView
from trl_ext.testing import Addition, tiny_llama, tiny_tokenizer

Weights = dict[str, Tensor]


@dataclass(eq=False)
class Recorder:
    """Keeps the raw weights of every step, in fp64; index 0 is the start."""

    trajectory: list[Weights] = field(default_factory=list)

    requires_api: ClassVar[str] = "1"
    trainers: ClassVar[tuple[str, ...]] = ("sft", "grpo")
    citation: ClassVar[str] = "test"

    @hookimpl
    def setup(self, context: SetupContext) -> None:
        self.trajectory = [snapshot(context.weights)]

    @hookimpl
    def weights_updated(self, weights: WeightsView, step: int, skipped: bool) -> None:
        self.trajectory.append(snapshot(weights))

    def path(self, name: str) -> Tensor:
        """(steps + 1, ...) fp64: one parameter's trajectory."""
        return torch.stack([weights[name] for weights in self.trajectory])


def snapshot(weights: WeightsView) -> Weights:
    return {name: tensor.double().clone() for name, tensor in zip(weights.names, weights.local(), strict=True)}


def data(size: int = 32, **options: Any) -> Dataset:
    return Addition().dataset(size, **options)


def trainer(
    output_dir: Path,
    plugins: list[Any],
    *,
    recorder: Recorder | None = None,
    model: Any = None,
    callbacks: list[Any] | None = None,
    peft_config: Any = None,
    make: Callable[..., Any] = SFTTrainer,
    **config: Any,
) -> Any:
    """A trainer of six steps at a rate that moves the weights visibly; nothing is logged or evaluated unless asked."""
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        **config,
    }
    return make(
        tiny_llama(hidden=16) if model is None else model,
        args=SFTConfig(str(output_dir), plugins=plugins, **settings),
        train_dataset=data(),
        eval_dataset=data(16, split="held_out"),
        processing_class=tiny_tokenizer(),
        plugins=[recorder] if recorder else None,
        callbacks=callbacks,
        peft_config=peft_config,
    )
