"""`adaptive-lr`: scales each step's gradient by 1 / (4 + 2 |grad|²)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from trl_ext import hookimpl
from trl_ext.gradients import GradientView
from trl_ext.records import StreamGradient


@dataclass(eq=False)
class AdaptiveLr:
    """The adaptive rate of the paper, taken per optimiser step instead of per sequence (for that see `pg`).

    The paper's rate is this factor at learning_rate=1 under SGD. It comes before clipping, which would undo part of
    it: a step is at most 1 / (2 sqrt(8)) = 0.18 long with the defaults. Adam divides the scale of gradients out again
    where it stays the same from step to step.

    Args:
        constant, slope: The factor is 1 / (constant + slope |grad|²).
    """

    requires_api: ClassVar[str] = "1"
    trainers: ClassVar[tuple[str, ...]] = ("sft", "grpo")
    citation: ClassVar[str] = (
        "Post-training with policy gradients: optimality and the base model barrier, arXiv 2603.06957 (adaptive rate)"
    )

    constant: float = 4.0
    slope: float = 2.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.constant) and self.constant > 0):
            raise ValueError(f"constant={self.constant}: above 0")
        if not (math.isfinite(self.slope) and self.slope >= 0):
            raise ValueError(f"slope={self.slope}: at least 0")
        self._factor: float | None = None

    @hookimpl
    def gradients_ready(self, gradients: GradientView, streams: Mapping[str, StreamGradient]) -> None:
        """Scale the reduced gradient of the window, over all parameters and shards."""
        factor = 1 / (self.constant + self.slope * gradients.squared_norm())
        gradients.mul_(factor)
        self._factor = float(factor)

    @hookimpl
    def metrics(self, mode: str) -> dict[str, float]:
        """The factor of the last step."""
        return {} if mode != "train" or self._factor is None else {"factor": self._factor}
