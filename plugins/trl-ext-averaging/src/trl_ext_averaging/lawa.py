"""LAWA: avg = (theta_n + theta_{n-1} + ... + theta_{n-k+1}) / k, the mean of the latest snapshots.

Snapshots are `every` optimiser steps apart; while there are fewer than k, the mean is of all of them. Gains grow with
the learning rate and with the spacing (arXiv:2306.03241). k = 6 is that of arXiv:2209.14981; the right spacing depends
on the length of the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from trl_ext.options import Range
from trl_ext_averaging.online import Interval, OnlineAverage
from trl_ext_averaging.shadows import Copies, CopyKind, widened


@dataclass(eq=False)
class Lawa(OnlineAverage):
    """The mean of the last `k` snapshots of the weights.

    The snapshots keep the weights' dtype and stay in host memory unless `device` says otherwise: k copies are much.

    Args:
        k: snapshots kept.
    """

    k: Annotated[int, Range(ge=1)] = 6
    every: Interval = field(default=100, kw_only=True)
    device: Literal["model", "cpu"] = field(default="cpu", kw_only=True)

    method: ClassVar[str] = "lawa"
    citation: ClassVar[str] = "Early weight averaging meets high learning rates for LLM pre-training, arXiv:2306.03241"
    cost: ClassVar[str] = "k copies of the weights, in host memory"

    def copy_kinds(self) -> Mapping[str, CopyKind]:
        return {f"snapshot_{i}": "exact" for i in range(self.k)}

    def update(self, copies: Copies, theta: list[Tensor], updates: int, step: int) -> None:
        torch._foreach_copy_(copies[f"snapshot_{(updates - 1) % self.k}"], theta)

    def deployed(self, name: str, copies: Copies, theta: list[Tensor]) -> Sequence[Tensor]:
        filled = min(self._updates, self.k)
        total = [torch.zeros_like(tensor) for tensor in theta]
        for i in range(filled):
            torch._foreach_add_(total, widened(copies[f"snapshot_{i}"]))
        torch._foreach_div_(total, float(filled))
        return total

    @property
    def ready(self) -> bool:
        return self._updates > 0
