"""`adaptive-lr`: the adaptive rate of arXiv 2603.06957, taken for each optimiser step.

    g <- g / (4 + 2 |g|²),    g: the window's gradient, reduced over ranks, before clipping

The paper has the rate eta = 1 / (4 + 2 |grad log p(y|x)|²) for each sequence, as `pg:adaptive=true` does: with a
constant rate the number of queries grows by a factor N, the length of the sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from trl_ext import hookimpl
from trl_ext.gradients import GradientView
from trl_ext.options import Range
from trl_ext.records import StreamGradient


@dataclass(eq=False)
class AdaptiveLr:
    """Scale the gradient of each optimiser step by 1 / (constant + slope |g|²).

    With learning_rate=1 under SGD this factor is the paper's rate. It is applied before clipping, which would undo part
    of it: with the defaults a step is at most 1 / (2 sqrt(8)) = 0.18 long. Adam divides the scale of gradients out
    again where it stays the same from step to step.

    Args:
        constant, slope: The factor is 1 / (constant + slope |grad|²).
    """

    requires_api: ClassVar[str] = "1"
    citation: ClassVar[str] = (
        "Post-training with policy gradients: optimality and the base model barrier, arXiv 2603.06957 (adaptive rate)"
    )
    cost: ClassVar[str] = "none that can be measured"

    constant: Annotated[float, Range(gt=0)] = 4.0
    slope: Annotated[float, Range(ge=0)] = 2.0

    def __post_init__(self) -> None:
        self._factor: Tensor | None = None

    @hookimpl
    def gradients_ready(self, gradients: GradientView, streams: Mapping[str, StreamGradient]) -> None:
        """Scale the window's gradient in place; its norm is over all parameters and shards."""
        self._factor = 1 / (self.constant + self.slope * gradients.squared_norm())
        gradients.mul_(self._factor)

    @hookimpl
    def metrics(self, mode: str) -> dict[str, float]:
        """The factor of the last step."""
        return {} if mode != "train" or self._factor is None else {"factor": float(self._factor)}
