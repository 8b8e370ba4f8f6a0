"""Entropy-regularised NLL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trl_ext import hookimpl
from trl_ext_objectives.objective import Objective
from trl_ext_objectives.schedule import NON_NEGATIVE

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import TokenRecord


@dataclass(eq=False)
class Entropy(Objective):
    """`-log p - beta H`: NLL with a bonus, in nats, for a next-token distribution that stays open.

    Args:
        beta: Weight of the bonus, at least 0, or a schedule.
    """

    citation: ClassVar[str] = "Regularizing by Penalizing Confident Output Distributions, arXiv 1701.06548"
    ranges = {"beta": NON_NEGATIVE}

    beta: float | str = 0.1

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T)."""
        return -tokens.log_probs - self.now("beta", tokens) * tokens.entropy
