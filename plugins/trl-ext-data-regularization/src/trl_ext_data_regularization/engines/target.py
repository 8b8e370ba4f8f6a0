"""The target's gradient as engines ask for it: whole tensors, or under FSDP2 this rank's shards of them.

FSDP2 has reduced and cut the gradient when it arrives here. Two ways lead from there to scores, and neither makes more
than one layer whole. Inner products with a sample's activations take the whole gradient of the layer at hand, gathered
when that layer asks: (N - 1) / N of its bytes received on each of N ranks, as FSDP2 gathers its weights. What is linear
in the gradient, such as a sketch, is taken of each rank's part and summed: no more bytes than the sketch has.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from trl_ext.gradients import as_sharded, sum_over_shards, whole_tensor


@dataclass(frozen=True)
class Part:
    """What one rank holds of a gradient."""

    tensor: Tensor
    shape: torch.Size
    """Of the whole."""
    place: Sequence[int]
    """Of the part's first element in the whole, along each dimension."""


@dataclass(frozen=True)
class Target:
    """The target's gradient of each of P parameters."""

    tensors: Sequence[Tensor | None]
    """P gradients, this rank's parts under FSDP2; None counts as zero."""
    parameters: Sequence[nn.Parameter] = ()
    """The P parameters, which say how the gradients are sharded; none where they are whole."""

    def whole(self, i: int) -> Tensor | None:
        """The gradient of parameter i. Collective under FSDP2."""
        tensor = self.tensors[i]
        return tensor if tensor is None or not self.parameters else whole_tensor(as_sharded(tensor, self.parameters[i]))

    def parts(self, function: Callable[[Part], Tensor]) -> dict[int, Tensor]:
        """The values of a linear function for this rank's parts, by parameter; `summed` makes them those of the whole.

        Args:
            function: its value for a gradient that is zero outside of a part.
        """
        return {i: function(self._part(i, t)) for i, t in enumerate(self.tensors) if t is not None}

    def _part(self, i: int, tensor: Tensor) -> Part:
        shape, place = tensor.shape, [0] * tensor.dim()
        parameter = self.parameters[i] if self.parameters else None
        if isinstance(parameter, DTensor):
            shape, mesh = parameter.shape, parameter.device_mesh
            for row, placement in enumerate(parameter.placements):
                if isinstance(placement, Shard):
                    # As long as `torch.chunk` makes them; the last ones are shorter, or empty.
                    chunk = -(-shape[placement.dim] // mesh.size(row))
                    place[placement.dim] = min(chunk * mesh.get_local_rank(row), shape[placement.dim])
        return Part(tensor, shape, place)

    def squared_norms(self, device: torch.device) -> Tensor:
        """(P,) float64. Collective under FSDP2."""
        present = {i: t for i, t in enumerate(self.tensors) if t is not None}
        dtype = reduce(torch.promote_types, (t.dtype for t in present.values()), torch.float32)
        norms = torch._foreach_norm(list(present.values()), 2, dtype=dtype) if present else ()
        squares = torch.zeros(len(self.tensors), dtype=torch.float64, device=device)
        for i, norm in zip(present, norms, strict=True):
            squares[i] = norm.double() ** 2
        return sum_over_shards(squares, self.parameters)


def summed(parts: Mapping[int, Tensor], parameters: Sequence[nn.Parameter]) -> dict[int, Tensor]:
    """The values of `Target.parts` over all ranks, in one sum for each size. Collective under FSDP2.

    Args:
        parts: by parameter; the size of a value is the same on all ranks.
        parameters: the P parameters, or none.
    """
    if not parameters:
        return dict(parts)
    alike, out = defaultdict[torch.Size, list[int]](list), dict[int, Tensor]()
    for i, value in parts.items():
        alike[value.shape].append(i)
    for indices in alike.values():
        sums = sum_over_shards(torch.stack([parts[i] for i in indices]), [parameters[i] for i in indices])
        out |= zip(indices, sums, strict=True)
    return out
