"""Two vectors compared: norms, cosine and the share of coordinates on which they disagree in sign."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

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
        device = parts[0][0].device
        columns = [torch.stack([value.to(device) for value in column]) for column in zip(*parts, strict=True)]
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


class UpdateTally:
    """Comparisons of both updates of each step, kept on the device until they are read."""

    NAMES = ("update_norm_rl", "update_norm_sft", "update_cosine", "update_sign_conflicts")

    def __init__(self) -> None:
        self._parts: dict[Any, tuple[Tensor, list[Tensor]]] = {}
        self._total: Tensor | None = None
        self._steps = 0

    def add(self, owner: Tensor, rl: Tensor, sft: Tensor) -> None:
        """Add the updates of some parameters as flat local tensors, sharded like `owner`.

        Ranks may cut their shards into other numbers of parts, so these are summed here, by layout.
        """
        layout = (owner.device_mesh, owner.placements) if isinstance(owner, DTensor) else owner.device
        values = products(rl, sft)
        if layout in self._parts:
            values = [a + b for a, b in zip(self._parts[layout][1], values, strict=True)]
        self._parts[layout] = owner, values

    def end_step(self, size: int) -> None:
        """Close an optimiser step on `size` parameters over all ranks. Collective where they are sharded."""
        owners, parts = zip(*self._parts.values(), strict=True)
        step = Comparison.of(parts, owners, size)
        self._parts = {}
        values = torch.stack([step.norm_a, step.norm_b, step.cosine, step.sign_conflicts])
        self._total = values if self._total is None else self._total + values
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Means per step since the last reading; empty before the first step."""
        if self._total is None:
            return {}
        values = dict(zip(self.NAMES, (self._total / self._steps).tolist(), strict=True))
        self._total, self._steps = None, 0
        return values
