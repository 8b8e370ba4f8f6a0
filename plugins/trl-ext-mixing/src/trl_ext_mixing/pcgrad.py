"""PCGrad for two: where the RL and SFT gradients conflict, each gives up its part against the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trl_ext.gradients import GradientView
from trl_ext.records import StreamGradient
from trl_ext_mixing.comparison import Comparison
from trl_ext_mixing.two_gradients import TwoGradients


def pcgrad_weights(squared_a: Tensor, squared_b: Tensor, dot: Tensor) -> tuple[Tensor, Tensor]:
    """Weights w with w_a a + w_b b = the sum of both gradients, each without its part along the other if a.b < 0.

    Projecting b off a takes (a.b / |a|^2) a away, so a's weight is 1 - a.b / |a|^2 (arXiv:2001.06782, algorithm 1).
    """
    tiny = torch.finfo(torch.float32).tiny
    conflict = dot.clamp(max=0.0)
    return 1 - conflict / squared_a.clamp(min=tiny), 1 - conflict / squared_b.clamp(min=tiny)


@dataclass(eq=False, kw_only=True)
class PCGrad(TwoGradients):
    """The sum of the two gradients without what conflicts, under one optimiser.

    Args:
        normalise: bring both gradients to the mean of their norms first. Without it a weight grows with the ratio of
            the norms, which for RL and SFT can be large.
    """

    normalise: bool = True

    method: ClassVar[str] = "pcgrad"
    citation: ClassVar[str] = "Yu et al., Gradient Surgery for Multi-Task Learning (PCGrad), arXiv:2001.06782"

    def mix(self, gradients: GradientView, sft: StreamGradient, both: Comparison) -> None:
        a, b = both.norm_a, both.norm_b
        scale_a = scale_b = torch.ones_like(a)
        if self.normalise and bool(a > 0) and bool(b > 0):  # reduced over ranks, so all of them take one branch
            scale_a, scale_b = (a + b) / (2 * a), (a + b) / (2 * b)
        a, b = a * scale_a, b * scale_b
        weight_a, weight_b = pcgrad_weights(a * a, b * b, both.cosine * a * b)
        self.note(weight_rl=weight_a, weight_sft=weight_b, conflict=float(both.cosine < 0))
        gradients.mul_(float(weight_a * scale_a)).axpy_(float(weight_b * scale_b), sft.gradients)
