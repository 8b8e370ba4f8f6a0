"""The power family (1 - p^alpha) / alpha, from NLL (alpha -> 0) over -p (alpha = 1) to prior-leaning (alpha > 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from trl_ext import hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import TokenRecord


def one_minus_exp(x: Tensor) -> Tensor:
    """`1 - e^x` for x <= 0, value and gradient to full relative precision.

    `1 - exp` loses the value near 0; the autograd of `expm1` is `result + 1`, which loses the gradient far below 0.
    """
    return torch.where(x > -0.5, -torch.expm1(x), 1 - torch.exp(x))


def power_loss(log_probs: Tensor, alpha: float) -> Tensor:
    """`(1 - p^alpha) / alpha` of each log-probability, any shape and float dtype (arXiv 2510.00526, section 3)."""
    return one_minus_exp(alpha * log_probs) / alpha


@dataclass(eq=False)
class Power:
    """Weigh each token by p^alpha: small alpha learns from every token, large alpha from those already likely.

    Args:
        alpha: Exponent, greater than 0. 1 is the paper's `-p` (TRL's `loss_type="dft"`), 10 its `-p^10`; near 0 is NLL.

    Raises:
        ValueError: `alpha` is not a positive finite number.
    """

    requires_api: ClassVar[str] = "1"
    trainers: ClassVar[tuple[str, ...]] = ("sft", "grpo")
    citation: ClassVar[str] = "Beyond Log Likelihood: Probability-Based Objectives for SFT, arXiv 2510.00526"

    alpha: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"power: alpha={self.alpha} is not a positive number; NLL is the limit alpha -> 0")

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T) of each label token, in [0, 1 / alpha]."""
        return power_loss(tokens.log_probs, self.alpha)
