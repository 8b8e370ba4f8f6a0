"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trl_ext_averaging.online import Copies, OnlineAverage


def decay_at(update: int, decay: float, warmup: bool) -> float:
    """Decay of update number `update` (from 1): with warm-up min(d, (1 + t) / (10 + t)), t the updates done before."""
    return min(decay, update / (9 + update)) if warmup else decay


@dataclass(eq=False)
class Ema(OnlineAverage):
    """avg <- d avg + (1 - d) theta, from the weights at `start`, once every `every` optimiser steps.

    Args:
        decay: d in [0, 1), per update; a list keeps one average for each value, named `ema_<d>`.
        warmup: raise the decay from 0.1 on, so that the start is forgotten sooner.
    """

    decay: float | list[float] = 0.999
    warmup: bool = False

    citation: ClassVar[str] = "Polyak and Juditsky, Acceleration of stochastic approximation by averaging, 1992"

    def __post_init__(self) -> None:
        self._decays = tuple(self.decay) if isinstance(self.decay, Sequence) else (self.decay,)
        if not self._decays or len(set(self._decays)) < len(self._decays):
            raise ValueError(f"ema: decay={self.decay!r} names no decay, or one twice")
        for decay in self._decays:
            if not 0 <= decay < 1:
                raise ValueError(f"ema: decay={decay!r} is not in [0, 1)")
        super().__post_init__()

    def averages(self) -> tuple[str, ...]:
        return ("ema",) if len(self._decays) == 1 else tuple(f"ema_{decay:g}" for decay in self._decays)

    def update(self, copies: Copies, theta: list[Tensor], updates: int, step: int) -> None:
        for name, decay in zip(self.averages(), self._decays, strict=True):
            torch._foreach_lerp_(copies[name], theta, 1 - decay_at(updates, decay, self.warmup))
