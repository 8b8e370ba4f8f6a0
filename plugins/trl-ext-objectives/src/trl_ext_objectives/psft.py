"""PSFT: `-min(r, clip(r, 1 - low, 1 + high))` with r = p / p_old (arXiv 2508.17784).

p_old is of the model of a few updates ago, so no update moves a token far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch

from trl_ext import hookimpl
from trl_ext.options import Range
from trl_ext_objectives.kept_tokens import KeptShare
from trl_ext_objectives.live_reference import StartModel
from trl_ext_objectives.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import RunDescription, SetupContext, TokenRecord, WeightsView


def psft_loss(log_probs: Tensor, old_log_probs: Tensor, low: float, high: float) -> Tensor:
    """`-min(r, clip(r, 1 - low, 1 + high))` with r = p / p_old; any shape and float dtype (arXiv 2508.17784).

    The advantage is 1, so only the upper bound stops a gradient: a token that has gained 1 + high is left alone.
    """
    ratio = (log_probs - old_log_probs).exp()
    return -torch.minimum(ratio, ratio.clamp(1 - low, 1 + high))


@dataclass(eq=False)
class PSFT(Objective):
    """Proximal SFT. The model of the last refresh gives p_old, by one extra forward per micro-batch.

    Memory: one copy of the trainable parameters, which is also in each checkpoint. Under FSDP2 each rank keeps its
    shards of it, and a copy of the trained ones while the extra forward runs.

    Args:
        low: How far the ratio may go below 1.
        high: How far it may go above 1.
        refresh_every: Optimiser steps between two refreshes. The source's run takes 8 (256 samples in batches of 32).
    """

    citation: ClassVar[str] = "Proximal Supervised Fine-Tuning, arXiv 2508.17784"
    cost: ClassVar[str] = "a forward, and a copy of the trainable weights"
    state_version: ClassVar[int] = 1

    low: Annotated[float, Range(ge=0, le=1)] = 0.2
    high: Annotated[float, Range(ge=0)] = 0.28
    refresh_every: Annotated[int, Range(ge=1)] = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self._old = StartModel()
        self._unclipped = KeptShare()

    @hookimpl
    def check(self, run: RunDescription) -> None:
        """Refuse runs in which a copy of the weights cannot be swapped in."""
        self._old.check(run)

    @hookimpl
    def setup(self, context: SetupContext) -> None:
        """Start from the model as it is."""
        self._old.setup(context)

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T) in [-(1 + high), 0] (arXiv 2508.17784).

        The core's denominator is all label tokens of the window.
        """
        old = tokens.reference_log_probs
        old = self._old.log_probs(tokens) if old is None else old
        self._unclipped.add(tokens.mask & (tokens.log_probs.detach() - old <= math.log1p(self.high)), tokens)
        return psft_loss(tokens.log_probs, old, self.low, self.high)

    @hookimpl
    def weights_updated(self, weights: WeightsView, step: int, skipped: bool) -> None:
        """Refresh after every `refresh_every` steps."""
        if step % self.refresh_every == 0:
            self._old.refresh()

    @hookimpl
    def metrics(self, mode: str) -> dict[str, float]:
        """`kept_share`: tokens of this rank that are not clipped."""
        return super().metrics(mode) | self._unclipped.pop(mode)

    def state_dict(self) -> dict[str, Any]:
        """The old model's trainable parameters."""
        return self._old.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self._old.load_state_dict(state)
