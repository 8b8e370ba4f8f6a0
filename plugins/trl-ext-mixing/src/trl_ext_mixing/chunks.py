"""Parts of the parameters that are stepped together, as flat copies and back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trl_ext.gradients import local_tensor

CHUNK = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Parameters stepped at a time, or one that is larger: of each chunk the starting point and both branches are held, 12
bytes a parameter in fp32. On a CPU they stay in its cache; on a GPU they fill the chip, and take 192 MiB."""


def chunks(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield parts of the parameters, each of one dtype, device and sharding."""
    kinds: dict[Any, list[nn.Parameter]] = defaultdict(list)
    for p in parameters:
        layout = (p.device_mesh, p.placements) if isinstance(p, DTensor) else None
        kinds[p.dtype, p.device, layout].append(p)
    for (_, device, _), members in kinds.items():
        limit = CHUNK["cpu" if device.type == "cpu" else "cuda"]
        chunk: list[nn.Parameter] = []
        size = 0
        for p in members:
            n = local_tensor(p.detach()).numel()
            if chunk and size + n > limit:
                yield chunk
                chunk, size = [], 0
            chunk.append(p)
            size += n
        yield chunk


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """One copy of all values, (N,)."""
    return torch.cat([t.flatten() for t in tensors])


def parts(values: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The reverse of `flat`: views of (N,) values in the tensors' shapes."""
    pieces = values.split([t.numel() for t in tensors])
    return [piece.view(t.shape) for piece, t in zip(pieces, tensors, strict=True)]
