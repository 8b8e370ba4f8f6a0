"""Functions of log-probabilities that stay exact from p = 1e-8 to 1 - 1e-8."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def one_minus_exp(x: Tensor) -> Tensor:
    """`1 - e^x` for x <= 0, value and gradient to full relative precision.

    `1 - exp` loses the value near 0; the autograd of `expm1` is `result + 1`, which loses the gradient far below 0.
    """
    return torch.where(x > -0.5, -torch.expm1(x), 1 - torch.exp(x))


def one_minus_p(log_probs: Tensor) -> Tensor:
    """The error 1 - p of each label."""
    return one_minus_exp(log_probs)


def below_one(log_probs: Tensor) -> Tensor:
    """Log-probabilities kept one rounding step away from p = 1, for formulas that are singular there.

    fp32 cannot tell 1 - p below its epsilon from rounding in the softmax, so those tokens (and masked positions, which
    have p = 1) get no gradient instead of an infinite one.
    """
    return log_probs.clamp(max=-torch.finfo(log_probs.dtype).eps)
