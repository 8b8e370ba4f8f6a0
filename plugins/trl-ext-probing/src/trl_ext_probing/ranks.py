"""Several processes under torchrun or `accelerate launch`: they share the work, and the first one writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar, cast

from trl_ext.errors import ConfigurationError

T = TypeVar("T")
R = TypeVar("R")


def rank() -> int:
    """This process's number, from the launcher's environment; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes there are; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process reads and writes files for all."""
    return rank() == 0


def refuse_several(probe: str) -> None:
    """Refuse a launcher for a probe that works in one process.

    Raises:
        ConfigurationError: There are several processes.
    """
    if world_size() > 1:
        raise ConfigurationError(f"probe {probe} runs in one process; start it without a launcher")


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes, on all of them; the others make nothing. Collective."""
    if world_size() == 1:
        return make()
    import torch.distributed as dist

    box: list[Any] = [make() if is_first() else None]
    _connect()
    dist.broadcast_object_list(box, src=0)
    return cast(T, box[0])


def share(items: Sequence[T], unit: Callable[[T], Hashable]) -> list[T]:
    """This process's part of items that all have: units are dealt out in turn, and the items of one stay together."""
    mine = set(list(dict.fromkeys(map(unit, items)))[rank() :: world_size()])
    return [item for item in items if unit(item) in mine]


def shared_work(items: Sequence[T], work: Callable[[list[T]], Iterable[R]], unit: Callable[[T], Hashable]) -> list[R]:
    """What `work` makes of the items, of which each process takes its part: all of it, on all processes. Collective.

    Args:
        items: The same on all processes.
        work: Makes something of some of the items; the order of what all make is none that a caller may rely on.
        unit: As of `share`.
    """
    made = list(work(share(items, unit)))
    if world_size() == 1:
        return made
    import torch.distributed as dist

    boxes: list[Any] = [None] * world_size()
    _connect()
    dist.all_gather_object(boxes, made)
    return [value for box in boxes for value in box]


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items, so many at a time."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def _connect() -> None:
    """Join the processes, over gloo, since it is Python objects on the CPU that they exchange."""
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
