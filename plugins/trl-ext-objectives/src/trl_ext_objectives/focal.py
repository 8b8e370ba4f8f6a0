"""Focal loss -(1 - p)^gamma log p, a baseline of the paper that leans further from the prior than NLL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trl_ext import hookimpl
from trl_ext_objectives.numerics import below_one, one_minus_p
from trl_ext_objectives.objective import Objective
from trl_ext_objectives.schedule import NON_NEGATIVE

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import TokenRecord


def focal_loss(log_probs: Tensor, gamma: float) -> Tensor:
    """`-(1 - p)^gamma log p`, any shape and float dtype."""
    log_probs = below_one(log_probs)  # (1 - p)^gamma has an infinite slope at p = 1 for gamma < 1
    return -(one_minus_p(log_probs) ** gamma) * log_probs


@dataclass(eq=False)
class Focal(Objective):
    """Scale NLL down where the label is already likely.

    Args:
        gamma: Focus, at least 0, or a schedule. 0 is NLL; 2 is the value of arXiv 1708.02002.
    """

    citation: ClassVar[str] = "Focal Loss for Dense Object Detection, arXiv 1708.02002; baseline of arXiv 2510.00526"
    ranges = {"gamma": NON_NEGATIVE}

    gamma: float | str = 2.0

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T)."""
        return focal_loss(tokens.log_probs, self.now("gamma", tokens))
