"""Power family: `(1 - p^alpha) / alpha` (arXiv 2510.00526, section 3).

It goes from NLL (alpha -> 0) over -p (alpha = 1) to objectives that lean on the model's prior (alpha > 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from trl_ext import hookimpl
from trl_ext.numerics import one_minus_exp
from trl_ext.options import Range
from trl_ext.schedules import Scheduled
from trl_ext_objectives.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import TokenRecord


def power_loss(log_probs: Tensor, alpha: float | Tensor) -> Tensor:
    """`(1 - p^alpha) / alpha` of each log-probability, any shape and float dtype (arXiv 2510.00526, section 3)."""
    return one_minus_exp(alpha * log_probs) / alpha


@dataclass(eq=False)
class Power(Objective):
    """Weigh each token by p^alpha: small alpha learns from every token, large alpha from those already likely.

    Args:
        alpha: Exponent, or a schedule. 1 is the paper's `-p` (TRL's `loss_type="dft"`), 10 its `-p^10`; near 0 is NLL.
    """

    citation: ClassVar[str] = "Beyond Log Likelihood: Probability-Based Objectives for SFT, arXiv 2510.00526"

    alpha: Annotated[Scheduled, Range(gt=0)] = 1.0

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T) in [0, 1 / alpha] (arXiv 2510.00526, section 3).

        The core's denominator is all label tokens of the window.
        """
        return power_loss(tokens.log_probs, self.now("alpha", tokens))
