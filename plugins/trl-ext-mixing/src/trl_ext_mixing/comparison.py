"""Two vectors compared: norms, cosine and the share of coordinates on which they disagree in sign."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trl_ext.gradients import local_tensor, sum_over_shards

_TINY = torch.finfo(torch.float32).tiny


def products(x: Tensor, y: Tensor) -> list[Tensor]:
    """|x|^2, |y|^2, x.y and the number of coordinates of opposite signs, () float32 each, of two local tensors."""
    x, y = x.flatten().float(), y.flatten().float()
    # In place on the CPU, where fresh memory costs more than the arithmetic; as bytes on a GPU, which counts traffic.
    product = x * y
    opposite = product.lt_(0).sum() if product.device.type == "cpu" else torch.count_nonzero(product < 0).float()
    return [x.dot(x), y.dot(y), x.dot(y), opposite]


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
    def of(cls, parts: Sequence[Sequence[Tensor]], owners: Sequence[Tensor], size: int) -> Comparison:
        """From the `products` of N parts of both vectors. Collective where parameters are sharded.

        Args:
            parts: N times four scalars.
            owners: N parameters, each of the layout of its part, over whose shards the sums go.
            size: coordinates of each vector, over all parts and shards.
        """
        columns = [torch.stack(column) for column in zip(*parts, strict=True)]
        squared_a, squared_b, dot, opposite = sum_over_shards(torch.stack(columns, dim=1), owners).sum(0)
        norm_a, norm_b = squared_a.sqrt(), squared_b.sqrt()
        return cls(norm_a, norm_b, dot / (norm_a * norm_b).clamp(min=_TINY), opposite / size)

    @classmethod
    def of_gradients(
        cls, parameters: Sequence[Tensor], a: Iterable[Tensor | None], b: Iterable[Tensor | None]
    ) -> Comparison:
        """Of two gradients of P parameters: local tensors in their shapes; None is zero."""
        parts = []
        for parameter, x, y in zip(parameters, a, b, strict=True):
            if x is None or y is None:
                zero = torch.zeros_like(local_tensor(parameter.detach()))
                x, y = (zero if x is None else x), (zero if y is None else y)
            parts.append(products(x, y))
        return cls.of(parts, parameters, sum(p.numel() for p in parameters))
