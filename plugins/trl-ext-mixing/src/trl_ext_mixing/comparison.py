"""Two vectors compared in one pass: norms, cosine and the share of coordinates on which they disagree in sign."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trl_ext.gradients import local_tensor, sum_over_shards

_TINY = torch.finfo(torch.float32).tiny


def products(parameters: Sequence[Tensor], a: Iterable[Tensor | None], b: Iterable[Tensor | None]) -> Tensor:
    """Sums over all parameters and shards, to be added up over parts of the model.

    Args:
        parameters: the P parameters.
        a, b: P local tensors each, in the parameters' shapes; None is zero.

    Returns:
        (5,) float32: |a|^2, |b|^2, a.b, coordinates of opposite signs, coordinates.
    """
    rows = []
    for parameter, x, y in zip(parameters, a, b, strict=True):
        local = local_tensor(parameter.detach())
        x = torch.zeros_like(local) if x is None else x
        y = torch.zeros_like(local) if y is None else y
        x, y = x.flatten().float(), y.flatten().float()
        opposite = (x * y).lt_(0).sum()  # in place: on the CPU fresh memory costs more than the arithmetic
        rows.append(torch.stack([x.dot(x), y.dot(y), x.dot(y), opposite, opposite.new_tensor(x.numel())]))
    return sum_over_shards(torch.stack(rows), parameters).sum(0)


@dataclass(frozen=True)
class Comparison:
    """What `products` says of two vectors; () float32 each."""

    norm_a: Tensor
    norm_b: Tensor
    cosine: Tensor
    """0 where one of the two is zero."""
    sign_conflicts: Tensor
    """Share in [0, 1]."""

    @classmethod
    def of(cls, products: Tensor) -> Comparison:
        """From the (5,) sums of `products`."""
        squared_a, squared_b, dot, opposite, count = products
        norm_a, norm_b = squared_a.sqrt(), squared_b.sqrt()
        return cls(norm_a, norm_b, dot / (norm_a * norm_b).clamp(min=_TINY), opposite / count)
