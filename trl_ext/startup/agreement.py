"""One answer on all ranks while a run starts: what one of them refuses, all refuse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from trl_ext.errors import ConfigurationError


@contextmanager
def agreed() -> Iterator[None]:
    """Raise on every rank if the block fails on any: the others would wait in TRL's constructor. Collective.

    A rank that has failed raises its own error.

    Raises:
        ConfigurationError: the block failed on another rank alone, whose message it has.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    messages = _gathered(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for rank, message in enumerate(messages):
        if message is not None:
            raise ConfigurationError(f"{message} [on rank {rank} of {len(messages)}]")


def _gathered(message: str | None) -> list[str | None]:
    if not (dist.is_available() and dist.is_initialized()):
        return [message]
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    return messages
