"""Several processes under torchrun or `accelerate launch`: they share the work, and the first one writes."""

from __future__ import annotations

import os
from typing import Any, TypeVar, cast

from trl_ext.errors import ConfigurationError

T = TypeVar("T")


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


def from_first(value: T) -> T:
    """The value that the first process has, on all of them. Collective."""
    if world_size() == 1:
        return value
    import torch.distributed as dist

    box: list[Any] = [value]
    _connect()
    dist.broadcast_object_list(box, src=0)
    return cast(T, box[0])


def gathered(values: list[T]) -> list[T]:
    """What all processes have, one after the other, on all of them. Collective."""
    if world_size() == 1:
        return values
    import torch.distributed as dist

    boxes: list[Any] = [None] * world_size()
    _connect()
    dist.all_gather_object(boxes, values)
    return [value for box in boxes for value in box]


def _connect() -> None:
    """Join the processes, over gloo, since it is Python objects on the CPU that they exchange."""
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
