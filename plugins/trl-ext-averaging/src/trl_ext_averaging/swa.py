"""SWA: avg_n = avg_{n-1} + (theta_n - avg_{n-1}) / n, the uniform mean of the trajectory's tail.

The n-th of the weights `every` optimiser steps apart, all after `start` (arXiv:1803.05407, algorithm 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trl_ext_averaging.online import OnlineAverage
from trl_ext_averaging.shadows import Copies


@dataclass(eq=False)
class Swa(OnlineAverage):
    """The mean of the weights since `start`."""

    method: ClassVar[str] = "swa"
    citation: ClassVar[str] = "Averaging weights leads to wider optima and better generalization, arXiv:1803.05407"

    def update(self, copies: Copies, theta: list[Tensor], updates: int, step: int) -> None:
        torch._foreach_lerp_(copies["swa"], theta, 1 / updates)

    @property
    def ready(self) -> bool:
        return self._updates > 0
