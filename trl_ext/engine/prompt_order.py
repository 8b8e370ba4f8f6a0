"""Which training prompt comes when: as a plugin decides, and in a resumed run as in one without a break."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.utils.data import Sampler
from trl.trainer.utils import RepeatSampler

from trl_ext.engine.guard import Guard
from trl_ext.errors import PluginError


def as_trl_draws(order: list[int], epoch: int) -> list[int]:
    """TRL's own order of an epoch."""
    return order


class PromptSampler(Sampler[int]):
    """TRL's `RepeatSampler` (groups, generation batches, repeats) over an order that may be chosen anew each epoch.

    TRL's draws its order once a pass from a generator of its own, so that a resumed run would begin with that of the
    first epoch again, whatever epoch it is in. Here the epoch decides.

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


@dataclass
class PromptOrder:
    """The order of the training prompts that the `prompt_order` hooks give, once an epoch."""

    guard: Guard
    chosen: tuple[int, list[int]] | None = None
    """The epoch whose order was chosen last, and the order: an epoch that is resumed keeps its own."""

    def choose(self, prompts: Any, order: list[int], epoch: int) -> list[int]:
        """The rows of `prompts` in the order to draw them in, out of TRL's. Collective.

        Raises:
            PluginError: the ranks would draw in different orders.
        """
        if self.chosen is None or self.chosen[0] != epoch:
            check = partial(_check, rows=len(prompts))
            order = self.guard.chain("prompt_order", "order", list(order), check, prompts=prompts, epoch=epoch)
            self.guard.agree()
            digest = hashlib.sha256(repr(order).encode()).hexdigest()
            if len(set(self.guard.gather(digest))) > 1:
                owners = " or ".join(name for name, _ in self.guard.plugins.calls("prompt_order"))
                raise PluginError(
                    f"plugin {owners} gave the ranks different orders in hook 'prompt_order' for epoch {epoch}: "
                    "groups would be torn apart; decide by what all ranks know"
                )
            self.chosen = epoch, order
        return self.chosen[1]


def _check(result: Any, rows: int) -> None:
    if not isinstance(result, list) or not all(type(row) is int for row in result):
        raise TypeError(f"returned {type(result).__name__}; expected a list of int")
    if len(result) != rows:
        raise ValueError(f"returned {len(result)} rows; expected {rows}, as many as the data set has (repeats count)")
    if rows and not (min(result) >= 0 and max(result) < rows):
        raise ValueError(f"returned row {min(result) if min(result) < 0 else max(result)}; rows are 0 to {rows - 1}")
