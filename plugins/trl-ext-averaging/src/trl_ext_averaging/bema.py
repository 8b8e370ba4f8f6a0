"""BEMA: an exponential moving average whose lag behind the weights is corrected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from trl_ext_averaging.online import Copies, OnlineAverage


@dataclass(eq=False)
class Bema(OnlineAverage):
    """EMA_t = (1 - b) EMA + b theta_t; deployed: EMA_t + a (theta_t - theta_0); a = (rho + gamma t)^-eta,
    b = (rho + gamma t)^-kappa, t the optimiser step (arXiv:2508.00180, algorithm 1).

    theta_0 are the weights at `start`. The EMA is that of the last update, a and theta_t are those of the moment.

    Args:
        kappa: power of the EMA's rate b; 0 follows the weights.
        eta: power of the correction a; a large value turns the correction off.
        rho: lag, the virtual age of the first update.
        gamma: how fast t counts.
        min_beta: lower bound of b.
    """

    kappa: float = 0.5
    eta: float = 0.2
    rho: float = 10.0
    gamma: float = 1.0
    min_beta: float = 0.0
    every: int = field(default=400, kw_only=True)

    method: ClassVar[str] = "bema"
    citation: ClassVar[str] = "EMA without the lag: bias-corrected iterate averaging schemes, arXiv:2508.00180"

    def __post_init__(self) -> None:
        for name in ("kappa", "eta", "gamma"):
            if getattr(self, name) < 0:
                raise ValueError(f"bema: {name}={getattr(self, name)!r} is negative")
        if self.rho < 1:
            raise ValueError(f"bema: rho={self.rho!r} is below 1, so that rates could exceed 1")
        if not 0 <= self.min_beta <= 1:
            raise ValueError(f"bema: min_beta={self.min_beta!r} is not in [0, 1]")
        super().__post_init__()

    def alpha(self, step: int) -> float:
        """Weight of the correction at an optimiser step."""
        return (self.rho + self.gamma * step) ** -self.eta

    def beta(self, step: int) -> float:
        """Rate of the EMA at an optimiser step."""
        return max((self.rho + self.gamma * step) ** -self.kappa, self.min_beta)

    def copy_dtypes(self) -> Mapping[str, Literal["wide", "exact"]]:
        return {"ema": "wide", "start": "exact"}

    def update(self, copies: Copies, theta: list[Tensor], updates: int, step: int) -> None:
        torch._foreach_lerp_(copies["ema"], theta, self.beta(step))

    def deployed(self, name: str, copies: Copies, theta: list[Tensor]) -> Sequence[Tensor]:
        drift = torch._foreach_sub(theta, copies["start"])
        return torch._foreach_add(copies["ema"], drift, alpha=self.alpha(self._step))
