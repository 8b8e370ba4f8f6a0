"""Huber loss on the error 1 - p, a baseline of the paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from trl_ext import hookimpl
from trl_ext_objectives.numerics import one_minus_p
from trl_ext_objectives.objective import Objective
from trl_ext_objectives.schedule import Range

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import TokenRecord


def huber_loss(log_probs: Tensor, delta: float) -> Tensor:
    """`e^2 / 2` where e = 1 - p is at most delta, else `delta e - delta^2 / 2`; any shape and float dtype."""
    error = one_minus_p(log_probs)
    return torch.where(error <= delta, error**2 / 2, delta * error - delta**2 / 2)


@dataclass(eq=False)
class Huber(Objective):
    """Square the error 1 - p of likely labels, and take it linearly for unlikely ones.

    Args:
        delta: Where the square ends, in (0, 1], or a schedule. 1 is the square throughout, `(1 - p)^2 / 2`.
    """

    citation: ClassVar[str] = "Baseline of Beyond Log Likelihood, arXiv 2510.00526"
    ranges = {"delta": Range(0, 1, open_low=True)}

    delta: float | str = 1.0

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T), in [0, delta]."""
        return huber_loss(tokens.log_probs, self.now("delta", tokens))
