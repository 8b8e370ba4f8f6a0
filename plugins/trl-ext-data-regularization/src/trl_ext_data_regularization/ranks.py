"""What the plugins exchange between ranks, and how a failure on one of them reaches all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class FailedElsewhere(Exception):
    """Another rank's part failed. Return the hook's fallback: the core raises that rank's error on all of them."""


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def together(part: Callable[[], T], device: torch.device) -> T:
    """Do this rank's part before a collective that all ranks go into, or none. Collective on several.

    Args:
        part: without collectives of its own, unless what precedes them cannot fail on one rank alone.
        device: where the flag lives.

    Raises:
        FailedElsewhere: the part failed on another rank.
        Exception: what the part raised on this one.
    """
    if world_size() == 1:
        return part()
    failure: Exception | None = None
    try:
        result = part()
    except Exception as error:
        failure = error
    failed = torch.tensor(failure is not None, dtype=torch.int32, device=device)
    dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if failure is not None:
        raise failure
    if failed:
        raise FailedElsewhere
    return result


def gather_rows(rows: Tensor) -> tuple[Tensor, slice]:
    """All ranks' rows (n_r, D) below one another, and which of them are this rank's. Collective; n_r may differ."""
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count)
    sizes = [int(c) for c in counts]
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
