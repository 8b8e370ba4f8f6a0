"""Work on a rank's own data before ranks communicate: a failure on one of them is an error on all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate.utils import gather_object

from trl_ext.errors import OnAllRanksError

T = TypeVar("T")


def on_every_rank(make: Callable[[], T]) -> T:
    """What `make` gives from this rank's data. Collective: a rank that had raised alone would be waited for.

    Raises:
        Exception: what `make` raised, on one rank.
        OnAllRanksError: on several, the same on each.
    """
    failure: Exception | None = None
    try:
        found = make()
    except Exception as error:
        failure = error
    messages = gather_object([None if failure is None else f"{type(failure).__name__}: {failure}"])
    if failure is not None and len(messages) == 1:
        raise failure
    for rank, message in enumerate(messages):
        if message is not None:
            raise OnAllRanksError(f"{message} [on rank {rank} of {len(messages)}]") from failure
    return found
