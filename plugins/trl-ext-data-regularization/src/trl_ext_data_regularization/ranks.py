"""What the plugins exchange between ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trl_ext.ranks import on_every_rank

A = TypeVar("A")
B = TypeVar("B")


def in_two_parts(begin: Callable[[], A], go_on: Callable[[A], B], *, collective: bool) -> B:
    """What `go_on` makes of what `begin` gives, on every rank or on none. Collective.

    Args:
        begin: works on this rank's data alone.
        go_on: runs the model.
        collective: whether that takes all ranks, as with sharded weights: then none starts where one has failed.

    Raises:
        Exception: as `on_every_rank` does.
    """
    if not collective:
        return on_every_rank(lambda: go_on(begin()))
    begun = on_every_rank(begin)
    return on_every_rank(lambda: go_on(begun))


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
