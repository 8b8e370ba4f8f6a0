"""EAFT: `-sg[min(H_K / ln K, 1)^exponent] log p`, H_K the entropy of the K = 20 likeliest tokens (arXiv 2601.02151).

Tokens that go against a confident prior are left alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from trl_ext import hookimpl
from trl_ext.options import Range
from trl_ext.schedules import Scheduled
from trl_ext_objectives.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import TokenRecord


def top_entropy(log_probs: Tensor) -> Tensor:
    """(...) entropy in nats of the K likeliest tokens, renormalised, from their log-probabilities (..., K)."""
    renormalised = log_probs.log_softmax(-1)
    return -(renormalised.exp() * renormalised).sum(-1)


def eaft_loss(log_probs: Tensor, entropy: Tensor, support: int, exponent: float) -> Tensor:
    """`-sg[min(H / ln support, 1)^exponent] log p`, any shape and float dtype (arXiv 2601.02151)."""
    gate = (entropy.detach() / math.log(support)).clamp(0, 1) ** exponent
    return -gate * log_probs


@dataclass(eq=False)
class EAFT(Objective):
    """Learn where the model is unsure, whatever the probability of the label.

    The paper's gate takes the 20 likeliest tokens, renormalised (the authors' code divides by 3 for ln 20).
    `gate=whole` takes the whole vocabulary, and opens wider where much of the entropy lies outside of the top: with
    p = 0.9 and the rest spread evenly over 2,000 tokens it is 0.362, and the paper's is 0.004.

    Args:
        support: Number K of tokens, whose uniform distribution opens the gate fully.
        exponent: Power of the gate, or a schedule.
        gate: "top" is the paper's, the entropy of the `support` likeliest tokens; "whole" is that of the vocabulary,
            with the gate held at 1.
    """

    citation: ClassVar[str] = "Entropy-Adaptive Fine-Tuning, arXiv 2601.02151"
    requires_api: ClassVar[str] = ">=1.5,<2"
    cost: ClassVar[str] = "one more output of the fused head; none with gate=whole"

    support: Annotated[int, Range(ge=2, le=9999)] = 20
    exponent: Annotated[Scheduled, Range(gt=0)] = 1.0
    gate: Literal["top", "whole"] = "top"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._top = f"top{self.support}_log_probs"
        if self.gate == "top":
            self.fused_outputs = (self._top,)

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T) in nats, at least 0 and at most NLL (arXiv 2601.02151).

        The core's denominator is all label tokens of the window.
        """
        entropy = tokens.entropy if self.gate == "whole" else top_entropy(tokens.extras[self._top])
        return eaft_loss(tokens.log_probs, entropy, self.support, self.now("exponent", tokens))
