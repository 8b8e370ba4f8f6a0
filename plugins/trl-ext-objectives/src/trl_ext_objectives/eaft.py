"""EAFT: NLL gated by the normalised entropy, so that tokens against a confident prior are left alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trl_ext import hookimpl
from trl_ext_objectives.objective import Objective
from trl_ext_objectives.schedule import POSITIVE, Range

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import TokenRecord


def eaft_loss(log_probs: Tensor, entropy: Tensor, support: float, exponent: float) -> Tensor:
    """`-sg[min(H / ln support, 1)^exponent] log p`, any shape and float dtype (arXiv 2601.02151)."""
    gate = (entropy.detach() / math.log(support)).clamp(0, 1) ** exponent
    return -gate * log_probs


@dataclass(eq=False)
class EAFT(Objective):
    """Learn where the model is unsure, whatever the probability of the label.

    The paper takes the entropy of the 20 likeliest tokens over ln 20; the fused head gives the entropy H of the whole
    vocabulary, which is above that only where the mass is spread, and the gate is 1 there.

    Args:
        support: Number of tokens, greater than 1, whose uniform distribution opens the gate fully.
        exponent: Power of the gate, greater than 0, or a schedule.
    """

    citation: ClassVar[str] = "Entropy-Adaptive Fine-Tuning, arXiv 2601.02151"
    ranges = {"support": Range(1, open_low=True), "exponent": POSITIVE}

    support: float = 20.0
    exponent: float | str = 1.0

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T)."""
        return eaft_loss(tokens.log_probs, tokens.entropy, self.support, self.now("exponent", tokens))
