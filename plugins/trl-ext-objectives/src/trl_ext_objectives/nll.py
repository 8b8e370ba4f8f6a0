"""Negative log-likelihood as an objective: TRL's own loss, for mixtures and comparisons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trl_ext import hookimpl
from trl_ext_objectives.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import TokenRecord


@dataclass(eq=False)
class NLL(Objective):
    """`-log p`: every token weighs 1 - p, so that the least likely ones lead."""

    citation: ClassVar[str] = "Baseline of arXiv 2510.00526"

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T)."""
        return -tokens.log_probs
