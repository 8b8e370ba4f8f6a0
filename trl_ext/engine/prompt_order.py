"""Which training prompt comes when in GRPO, where a plugin decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import Sampler
from trl.trainer.utils import RepeatSampler


class PromptSampler(Sampler[int]):
    """TRL's `RepeatSampler` (groups, generation batches, repeats) over an order that may be chosen anew each epoch.

    Args:
        sampler: TRL's own, whose rows, counts and seed are kept.
        choose: (TRL's order, epoch) to the order to use; both list len(data set) row numbers.
    """

    def __init__(self, sampler: RepeatSampler, choose: Callable[[list[int], int], list[int]]) -> None:
        self.choose = choose
        self.epoch = 0
        self._own = sampler
        self._places = RepeatSampler(
            sampler.data_source,
            mini_repeat_count=sampler.mini_repeat_count,
            batch_size=sampler.batch_size,
            repeat_count=sampler.repeat_count,
            shuffle=False,
        )

    def set_epoch(self, epoch: int) -> None:
        """Called by transformers before each pass."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        own = self._own
        # One row at a time, once: TRL's permutation and nothing else. Every pass draws another one.
        passes = RepeatSampler(own.data_source, mini_repeat_count=1, shuffle=own.shuffle, seed=own.seed)
        for _ in range(self.epoch + 1):
            permutation = list(passes)
        order = self.choose(permutation, self.epoch)
        return (order[place] for place in self._places)

    def __len__(self) -> int:
        return len(self._places)


def check_order(result: Any, rows: int) -> None:
    """Check what a `prompt_order` hook returned.

    Raises:
        TypeError: it is no list of integers.
        ValueError: it is not one row number for each row of the data set.
    """
    if not isinstance(result, list) or not all(type(row) is int for row in result):
        raise TypeError(f"returned {type(result).__name__}; expected a list of int")
    if len(result) != rows:
        raise ValueError(f"returned {len(result)} rows; expected {rows}, as many as the data set has (repeats count)")
    if rows and not (min(result) >= 0 and max(result) < rows):
        raise ValueError(f"returned row {min(result) if min(result) < 0 else max(result)}; rows are 0 to {rows - 1}")
