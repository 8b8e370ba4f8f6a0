"""LAWA: the mean of the latest snapshots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from trl_ext_averaging.online import Copies, OnlineAverage, widened


@dataclass(eq=False)
class Lawa(OnlineAverage):
    """The mean of the last `k` snapshots, `every` optimiser steps apart (all of them while there are fewer).

    The snapshots keep the weights' dtype and stay in host memory unless `device` says otherwise: k copies are much.
    Gains grow with the learning rate and the spacing (arXiv:2306.03241); k = 6 is that of arXiv:2209.14981, the right
    spacing depends on the length of the run.

    Args:
        k: snapshots kept.
    """

    k: int = 6
    every: int = field(default=100, kw_only=True)
    device: Literal["model", "cpu"] = field(default="cpu", kw_only=True)

    method: ClassVar[str] = "lawa"
    citation: ClassVar[str] = "Early weight averaging meets high learning rates for LLM pre-training, arXiv:2306.03241"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"lawa: k={self.k} is not a number of snapshots (1 or more)")
        super().__post_init__()

    def copy_dtypes(self) -> Mapping[str, Literal["wide", "exact"]]:
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
