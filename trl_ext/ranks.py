"""Work on a rank's own data before ranks communicate: a failure on one of them is an error on all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object

from trl_ext.errors import OnAllRanksError

T = TypeVar("T")


def on_every_rank(make: Callable[[], T]) -> T:
    """What `make` gives from this rank's data. Collective: a rank that had raised alone would be waited for.

    Ranks exchange one number, and messages only where one of them has failed.

    Raises:
        Exception: what `make` raised, on one rank.
        OnAllRanksError: on several, the same on each.
    """
    state = PartialState()
    if state.num_processes == 1:
        return make()
    found, failure = None, None
    try:
        found = make()
    except Exception as error:
        failure = error
    failed = torch.tensor(failure is not None, dtype=torch.int32, device=state.device)
    dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if not failed:
        return cast(T, found)
    messages = gather_object([None if failure is None else f"{type(failure).__name__}: {failure}"])
    rank = next(rank for rank, message in enumerate(messages) if message is not None)
    raise OnAllRanksError(f"{messages[rank]} [on rank {rank} of {len(messages)}]") from failure
