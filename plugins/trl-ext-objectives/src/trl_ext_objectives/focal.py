"""Focal loss: `-(1 - p)^gamma log p` (arXiv 1708.02002, equation 4), a baseline of arXiv 2510.00526."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from trl_ext import hookimpl
from trl_ext.numerics import one_minus_exp
from trl_ext.options import Range
from trl_ext.schedules import Scheduled
from trl_ext_objectives.log1mp import below_one
from trl_ext_objectives.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import TokenRecord


def focal_loss(log_probs: Tensor, gamma: float) -> Tensor:
    """`-(1 - p)^gamma log p`, any shape and float dtype (arXiv 1708.02002, equation 4)."""
    log_probs = below_one(log_probs)  # (1 - p)^gamma has an infinite slope at p = 1 for gamma < 1
    return -(one_minus_exp(log_probs) ** gamma) * log_probs


@dataclass(eq=False)
class Focal(Objective):
    """Scale NLL down where the label is already likely, which leans further from the prior than NLL does.

    Args:
        gamma: Focus, or a schedule. 0 is NLL; 2 is the value of arXiv 1708.02002.
    """

    citation: ClassVar[str] = "Focal Loss for Dense Object Detection, arXiv 1708.02002; baseline of arXiv 2510.00526"

    gamma: Annotated[Scheduled, Range(ge=0)] = 2.0

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T) in nats, at least 0 and at most NLL (arXiv 1708.02002, equation 4).

        The core's denominator is all label tokens of the window.
        """
        return focal_loss(tokens.log_probs, self.now("gamma", tokens))
