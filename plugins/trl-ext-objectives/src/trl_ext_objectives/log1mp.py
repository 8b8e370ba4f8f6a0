"""log(1 - p): the most prior-leaning member of the paper's family, W(p) = p."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trl_ext import hookimpl
from trl_ext_objectives.numerics import below_one, one_minus_p
from trl_ext_objectives.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import TokenRecord


def log1mp_loss(log_probs: Tensor) -> Tensor:
    """`log(1 - p)`, any shape and float dtype. Tokens within one epsilon of p = 1 are held there, without gradient."""
    return one_minus_p(below_one(log_probs)).log()


@dataclass(eq=False)
class Log1mp(Objective):
    """`log(1 - p)`: the weight of a token is its probability, so that the surest tokens lead.

    The loss is negative and falls without bound as p -> 1.
    """

    citation: ClassVar[str] = "Beyond Log Likelihood: Probability-Based Objectives for SFT, arXiv 2510.00526"

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T)."""
        return log1mp_loss(tokens.log_probs)
