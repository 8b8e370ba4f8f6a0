"""Entropy-regularised NLL: `-log p - beta H` (arXiv 1701.06548)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from trl_ext import hookimpl
from trl_ext.options import Range
from trl_ext.schedules import Scheduled
from trl_ext_objectives.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import TokenRecord


@dataclass(eq=False)
class Entropy(Objective):
    """NLL with a bonus, in nats, for a next-token distribution that stays open.

    Args:
        beta: Weight of the bonus, or a schedule; 0.1 is our choice.
    """

    citation: ClassVar[str] = "Regularizing by Penalizing Confident Output Distributions, arXiv 1701.06548"
    cost: ClassVar[str] = "about 4 % more memory"

    beta: Annotated[Scheduled, Range(ge=0)] = 0.1

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T) in nats, at least -beta ln V (arXiv 1701.06548).

        The core's denominator is all label tokens of the window.
        """
        return -tokens.log_probs - self.now("beta", tokens) * tokens.entropy
