"""Thresholded NLL or 1 - p: `f(p) 1[p >= q]`, or `f(p) 1[p <= q]`, with f(p) = -log p or 1 - p (arXiv 2510.00526)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from trl_ext_probing.capability.positions import Capability

from trl_ext import hookimpl
from trl_ext.options import Range
from trl_ext.schedules import Scheduled
from trl_ext_objectives.kept_tokens import KeptShare, Normalization, normalized
from trl_ext_objectives.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import RunDescription, TokenRecord

Side = Literal["above", "below"]


def keep_side(log_probs: Tensor, mask: Tensor, q: float, side: Side) -> Tensor:
    """The label tokens with p >= q ("above") or p <= q ("below"), both inclusive, as (B, T) bool."""
    log_q = math.log(q) if q > 0 else -math.inf
    return mask & (log_probs >= log_q if side == "above" else log_probs <= log_q)


@dataclass(eq=False)
class Threshold(Objective):
    """Train on the tokens that the current model finds likely (or unlikely) enough; the choice is made anew each time.

    Args:
        q: Probability, or a schedule; 0.2 is that of the paper's main table. With `quantile_of`, the share of the base
            model's tokens that lie below the threshold: `q=0.9` keeps the likeliest tenth.
        side: "above" keeps p >= q, "below" keeps p <= q.
        loss: "nll" or "1-p", of the kept tokens.
        normalization: "valid" divides by all label tokens of the window (TRL's), "kept" each micro-batch by its kept
            tokens (the paper's). Logged as `normalized_by_kept`, 0 or 1.
        quantile_of: Output folder of `trl-ext probe capability` for the base model on this data set. The quantiles are
            those before training, and stay.
    """

    citation: ClassVar[str] = "Beyond Log Likelihood: Probability-Based Objectives for SFT, arXiv 2510.00526"

    q: Annotated[Scheduled, Range(ge=0, le=1)] = 0.2
    side: Side = "above"
    loss: Literal["nll", "1-p"] = "nll"
    normalization: Normalization = "valid"
    quantile_of: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._kept = KeptShare()
        self._base: Capability | None = None

    @hookimpl
    def check(self, run: RunDescription) -> None:
        """Read the base model's quantiles, before the model loads."""
        if self.quantile_of:
            self._base = Capability.load(self.quantile_of, "threshold: quantile_of")

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T), at least 0, and 0 for tokens that are not kept (arXiv 2510.00526).

        The denominator is all label tokens of the window, or the kept tokens of each micro-batch: see `normalization`.
        """
        q = self.now("q", tokens)
        if self.quantile_of:
            self._base = self._base or Capability.load(self.quantile_of, "threshold: quantile_of")
            q = self._base.quantile(q)
        kept = keep_side(tokens.log_probs.detach(), tokens.mask, q, self.side)
        self._kept.add(kept, tokens)
        loss = -tokens.log_probs if self.loss == "nll" else tokens.one_minus_probs
        return normalized(loss, kept, tokens, self.normalization)

    @hookimpl
    def metrics(self, mode: str) -> dict[str, float]:
        """The share of tokens kept on this rank since the last log, and which denominator is in use."""
        by_kept = {"normalized_by_kept": float(self.normalization == "kept")}
        return super().metrics(mode) | by_kept | self._kept.pop(mode)
