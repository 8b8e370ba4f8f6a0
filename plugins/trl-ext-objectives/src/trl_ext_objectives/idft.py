"""IDFT: `-sg[p^g] log p` with g = clamp(exp(-(log p + H)), low, high) (arXiv 2602.12222).

log p + H is 0 on average under the model itself, so g is 1 for a label that surprises as much as the model expected,
and large for one that surprises more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from trl_ext import hookimpl
from trl_ext.options import Range
from trl_ext_objectives.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import TokenRecord


def idft_loss(log_probs: Tensor, entropy: Tensor, low: float, high: float) -> Tensor:
    """`-sg[p^g] log p` with g = clamp(exp(-(log p + H)), low, high); any shape and float dtype (arXiv 2602.12222)."""
    expected = log_probs.detach()
    exponent = (-(expected + entropy.detach())).exp().clamp(low, high)
    return -(exponent * expected).exp() * log_probs


@dataclass(eq=False)
class IDFT(Objective):
    """Weigh each token by p^g, where g says how surprising the label is.

    Args:
        low: Smallest g.
        high: Largest g, at least `low`.

    Raises:
        ValueError: `low` is above `high`.
    """

    citation: ClassVar[str] = "In-Distribution Fine-Tuning, arXiv 2602.12222"

    low: Annotated[float, Range(gt=0)] = 0.1
    high: Annotated[float, Range(gt=0)] = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low > self.high:
            raise ValueError(f"low={self.low} is above high={self.high}")

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T) in [0, 1 / (e low)] nats (arXiv 2602.12222).

        The core's denominator is all label tokens of the window.
        """
        return idft_loss(tokens.log_probs, tokens.entropy, self.low, self.high)
