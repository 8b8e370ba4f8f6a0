"""`log(1 - p)`: the member of the family of arXiv 2510.00526 that leans most on the prior, with W(p) = p."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from trl_ext import hookimpl
from trl_ext.numerics import one_minus_exp
from trl_ext_objectives.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import TokenRecord


def log1mp_loss(log_probs: Tensor) -> Tensor:
    """`log(1 - p)`, any shape and float dtype. Tokens within one epsilon of p = 1 are held there, without gradient."""
    return one_minus_exp(below_one(log_probs)).log()


def below_one(log_probs: Tensor) -> Tensor:
    """Log-probabilities kept one rounding step away from p = 1, for formulas that are singular there.

    fp32 cannot tell 1 - p below its epsilon from rounding in the softmax, so those tokens (and masked positions, which
    have p = 1) get no gradient instead of an infinite one.
    """
    return log_probs.clamp(max=-torch.finfo(log_probs.dtype).eps)


@dataclass(eq=False)
class Log1mp(Objective):
    """The weight of a token is its probability, so that the surest tokens lead."""

    citation: ClassVar[str] = "Beyond Log Likelihood: Probability-Based Objectives for SFT, arXiv 2510.00526"

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T) in [log eps, 0]: it falls without bound as p -> 1, up to rounding (arXiv 2510.00526).

        The core's denominator is all label tokens of the window.
        """
        return log1mp_loss(tokens.log_probs)
