"""A rank that never comes back: which hook of which plugin each rank is in, and an end to the waiting.

An error on one rank is agreed on, but a rank that is stuck in a hook, or in a collective that the others do not join,
raises nothing: all wait until the process group times out, half an hour later, and nothing says for whom.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from trl_ext.errors import ConfigurationError

logger = logging.getLogger(__name__)

LIMIT = "TRL_EXT_WATCHDOG_SECONDS"
"""Environment variable: how long a hook, or an agreement of ranks, may take at most. Unset, there is no watchdog."""
EXIT_CODE = 75
_OUTSIDE = "outside of hooks"


def watched(world_size: int) -> Callable[[str], AbstractContextManager[None]]:
    """Give contexts for whatever may keep a rank waiting, each with a text that says what it is.

    Raises:
        ConfigurationError: the environment variable holds no positive number.
    """
    text = os.environ.get(LIMIT)
    if text is None or world_size == 1:
        return _unwatched
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not limit > 0:
        raise ConfigurationError(f"{LIMIT}={text} is not a number of seconds; set one above 0, or unset it")
    return _watchdog(limit).at


def _unwatched(place: str) -> AbstractContextManager[None]:
    return nullcontext()


@cache
def _watchdog(limit: float) -> Watchdog:
    return Watchdog(limit)


class Watchdog:
    """A thread that ends the process, with a report, once a context has been open for too long.

    Each rank keeps in the process group's store where it is, so that the report of one names all.

    Args:
        limit: seconds.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._place, self._since = _OUTSIDE, time.monotonic()
        self._inside = False
        threading.Thread(target=self._watch, name="trl_ext watchdog", daemon=True).start()

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Watch the block."""
        before = self._place, self._since, self._inside
        self._place, self._since, self._inside = place, time.monotonic(), True
        try:
            yield
        finally:
            self._place, self._since, self._inside = before
            if not self._inside:
                self._place, self._since = f"{_OUTSIDE}, the last was {place}", time.monotonic()

    def _watch(self) -> None:
        while True:
            time.sleep(self.limit / 4)
            if not dist.is_initialized():
                continue
            waited = time.monotonic() - self._since
            store = _get_default_store()
            store.set(_key(dist.get_rank()), f"{self._place} (for {waited:.0f} s)")
            if self._inside and waited > self.limit:
                time.sleep(self.limit / 4)  # the others write where they are meanwhile
                self._end()

    def _end(self) -> None:
        store, keys = _get_default_store(), [_key(rank) for rank in range(dist.get_world_size())]
        places = [store.get(key).decode() if store.check([key]) else "not known" for key in keys]
        logger.critical(
            "a hook or an agreement of ranks took more than %s=%g seconds: %s. What communicates in a hook has to run "
            "on all ranks alike. The run ends here",
            *(LIMIT, self.limit, "; ".join(f"rank {rank}: {place}" for rank, place in enumerate(places))),
        )
        faulthandler.dump_traceback()
        os._exit(EXIT_CODE)


def _key(rank: int) -> str:
    return f"trl_ext/watchdog/{rank}"
