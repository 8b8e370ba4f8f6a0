"""Functions of log-probabilities that are exact to full relative precision from p = 1e-8 to 1 - 1e-8."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def one_minus_exp(x: Tensor) -> Tensor:
    """`1 - e^x` for x <= 0, any shape and float dtype, in value and gradient.

    With x = log p it is 1 - p, which `1 - p.exp()` loses near p = 1 (in fp32, 19 % at log p = -1e-7). `-expm1` alone
    would lose the gradient far below 0, since autograd takes the slope of `expm1` as its result plus 1.
    """
    import torch

    return torch.where(x > -0.5, -torch.expm1(x), 1 - torch.exp(x))
