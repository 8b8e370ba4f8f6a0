"""NLL: `-log p`, TRL's own loss, as an objective for mixtures and comparisons (baseline of arXiv 2510.00526)."""

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
    """Negative log-likelihood: every token weighs 1 - p, so that the least likely ones lead."""

    citation: ClassVar[str] = "Baseline of arXiv 2510.00526"
    unsupported: ClassVar[dict[str, str]] = {"changes_something": "It is the loss that TRL has, to compare others with"}

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T) in nats, at least 0 (baseline of arXiv 2510.00526).

        The core's denominator is all label tokens of the window.
        """
        return -tokens.log_probs
