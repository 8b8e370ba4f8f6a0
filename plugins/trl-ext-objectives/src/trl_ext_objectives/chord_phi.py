"""CHORD's token weight phi = p (1 - p): learn neither what is known nor what is far off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trl_ext import hookimpl
from trl_ext_objectives.numerics import one_minus_p
from trl_ext_objectives.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import TokenRecord


def chord_phi_loss(log_probs: Tensor) -> Tensor:
    """`-sg[p (1 - p)] log p`, any shape and float dtype (arXiv 2508.11408)."""
    detached = log_probs.detach()
    return -detached.exp() * one_minus_p(detached) * log_probs


@dataclass(eq=False)
class ChordPhi(Objective):
    """Weigh each token by p (1 - p), largest at p = 1/2. In gradient, Huber with delta = 1."""

    citation: ClassVar[str] = "CHORD: On-Policy RL Meets Off-Policy Experts, arXiv 2508.11408"

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T)."""
        return chord_phi_loss(tokens.log_probs)
