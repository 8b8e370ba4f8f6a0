"""Huber loss on the error e = 1 - p: `e^2 / 2` if e <= delta, else `delta e - delta^2 / 2`.

It is a baseline of arXiv 2510.00526, which does not give delta.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch

from trl_ext import hookimpl
from trl_ext.options import Range
from trl_ext.schedules import Scheduled
from trl_ext_objectives.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import TokenRecord


def huber_loss(error: Tensor, delta: float) -> Tensor:
    """`e^2 / 2` where the error e = 1 - p is at most delta, else `delta e - delta^2 / 2`; any shape, float dtype."""
    return torch.where(error <= delta, error**2 / 2, delta * error - delta**2 / 2)


@dataclass(eq=False)
class Huber(Objective):
    """Square the error 1 - p of likely labels, and take it linearly for unlikely ones.

    Args:
        delta: Where the square ends, or a schedule. 1 is the square throughout, `(1 - p)^2 / 2`; it is our choice.
    """

    citation: ClassVar[str] = "Baseline of Beyond Log Likelihood, arXiv 2510.00526"

    delta: Annotated[Scheduled, Range(gt=0, le=1)] = 1.0

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T) in [0, delta] (baseline of arXiv 2510.00526).

        The core's denominator is all label tokens of the window.
        """
        return huber_loss(tokens.one_minus_probs, self.now("delta", tokens))
