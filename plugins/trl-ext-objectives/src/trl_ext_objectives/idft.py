"""IDFT: DFT with an exponent per token, large where the label is less likely than the model expected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trl_ext import hookimpl
from trl_ext_objectives.objective import Objective
from trl_ext_objectives.schedule import POSITIVE

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import TokenRecord


def idft_loss(log_probs: Tensor, entropy: Tensor, low: float, high: float) -> Tensor:
    """`-sg[p^g] log p` with g = clamp(exp(-(log p + H)), low, high); any shape and float dtype (arXiv 2602.12222).

    log p + H is 0 on average under the model itself, so g is 1 for an unsurprising label.
    """
    expected = log_probs.detach()
    exponent = (-(expected + entropy.detach())).exp().clamp(low, high)
    return -(exponent * expected).exp() * log_probs


@dataclass(eq=False)
class IDFT(Objective):
    """Weigh each token by p^g, g by how surprising the label is.

    Args:
        low, high: Bounds of g, greater than 0.
    """

    citation: ClassVar[str] = "In-Distribution Fine-Tuning, arXiv 2602.12222"
    ranges = {"low": POSITIVE, "high": POSITIVE}

    low: float = 0.1
    high: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low > self.high:
            raise ValueError(f"IDFT: low={self.low} is above high={self.high}")

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T)."""
        return idft_loss(tokens.log_probs, tokens.entropy, self.low, self.high)
