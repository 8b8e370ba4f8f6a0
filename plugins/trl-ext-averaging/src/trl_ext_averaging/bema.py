"""BEMA: EMA_t = (1 - b_t) EMA_{t-1} + b_t theta_t; deployed are EMA_t + a_t (theta_t - theta_0).

a_t = (rho + gamma t)^-eta corrects the lag behind the weights, b_t = (rho + gamma t)^-kappa is the rate; t is the
optimiser step, EMA_0 = theta_0 (arXiv:2508.00180, algorithm 1). theta_0 are the weights at `start`. Between updates the
EMA is that of the last one, while a_t and theta_t are those of the moment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from trl_ext.options import Range
from trl_ext_averaging.online import Interval, OnlineAverage
from trl_ext_averaging.shadows import Copies, CopyKind

NonNegative = Annotated[float, Range(ge=0)]


@dataclass(eq=False)
class Bema(OnlineAverage):
    """An exponential moving average whose lag behind the weights is corrected.

    Args:
        kappa: power of the EMA's rate b; 0 follows the weights.
        eta: power of the correction a; a large value turns the correction off.
        rho: lag, the virtual age of the first update; below 1, rates could exceed 1.
        gamma: how fast t counts.
        min_beta: lower bound of b.
    """

    kappa: NonNegative = 0.5
    eta: NonNegative = 0.2
    rho: Annotated[float, Range(ge=1)] = 10.0
    gamma: NonNegative = 1.0
    min_beta: Annotated[float, Range(ge=0, le=1)] = 0.0
    every: Interval = field(default=400, kw_only=True)

    method: ClassVar[str] = "bema"
    citation: ClassVar[str] = "EMA without the lag: bias-corrected iterate averaging schemes, arXiv:2508.00180"
    cost: ClassVar[str] = "two copies of the weights, and an update of them"

    def alpha(self, step: int) -> float:
        """a_t, the weight of the correction at an optimiser step."""
        return (self.rho + self.gamma * step) ** -self.eta

    def beta(self, step: int) -> float:
        """b_t, the rate of the EMA at an optimiser step."""
        return max((self.rho + self.gamma * step) ** -self.kappa, self.min_beta)

    def copy_kinds(self) -> Mapping[str, CopyKind]:
        return {"ema": "wide", "start": "exact"}

    def update(self, copies: Copies, theta: list[Tensor], updates: int, step: int) -> None:
        torch._foreach_lerp_(copies["ema"], theta, self.beta(step))

    def deployed(self, name: str, copies: Copies, theta: list[Tensor]) -> Sequence[Tensor]:
        drift = torch._foreach_sub(theta, copies["start"])
        return torch._foreach_add(copies["ema"], drift, alpha=self.alpha(self._step))
