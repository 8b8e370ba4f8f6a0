"""What the plugins exchange between ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather_rows(rows: Tensor) -> tuple[Tensor, slice]:
    """All ranks' rows (n_r, D) below one another, and which of them are this rank's. Collective; n_r may differ."""
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count)
    sizes = torch.cat(counts).tolist()
    padded = rows.new_zeros(max(sizes), rows.shape[1])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    start = sum(sizes[: dist.get_rank()])
    return torch.cat([p[:n] for p, n in zip(parts, sizes, strict=True)]), slice(start, start + len(rows))


def total_over_ranks(count: Tensor) -> Tensor:
    """The sum over all ranks, elementwise. Collective."""
    if world_size() > 1:
        count = count.clone()
        dist.all_reduce(count)
    return count
