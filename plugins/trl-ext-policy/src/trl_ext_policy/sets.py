"""What the methods share that reward a set of k completions for its best one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from trl_ext import hookimpl
from trl_ext.groups import judged_total
from trl_ext.options import Range
from trl_ext.records import Rewards, Rollouts, RunDescription, SetupContext
from trl_ext.schedules import Scheduled, parse_schedules
from trl_ext_policy.relations import ALONE, NEW_ADVANTAGES
from trl_ext_policy.run_checks import refuse_other_sums, refuse_small_groups


@dataclass(eq=False, kw_only=True)
class SetsOfK(ABC):
    """Base of the methods whose advantages follow from the rewards of a group and k alone.

    A completion that no reward function judged has advantage 0 and is not counted among its group's n. Where fewer than
    k are left, as in an evaluation with small groups, all have advantage 0.

    Args:
        k: completions of a set, a whole number, or a schedule from one to another such as "linear:8:1" or
            "linear:8:1:0.5", which is there after half of the training; rounded in between.
    """

    k: Annotated[Scheduled, Range(ge=1)] = 4

    requires_api: ClassVar[str] = "1"
    trainers: ClassVar[tuple[str, ...]] = ("grpo",)
    cost: ClassVar[str] = "none that can be measured"
    provides: ClassVar[tuple[str, ...]] = (NEW_ADVANTAGES,)
    conflicts: ClassVar[Mapping[str, str]] = ALONE

    def __post_init__(self) -> None:
        self._k = parse_schedules(self)["k"]
        if not (float(self._k.start).is_integer() and float(self._k.end).is_integer()):
            raise ValueError(f"k={self.k!r} does not begin and end with whole numbers of completions")
        self._max_steps = 1

    @abstractmethod
    def of_group(self, rewards: Tensor, k: int) -> Tensor:
        """(n,) double: the advantages of a group whose completions have these rewards, (n,) double, n >= k."""

    @hookimpl
    def check(self, run: RunDescription) -> None:
        """Refuse groups that are smaller than a set."""
        refuse_other_sums(run.args)
        written = self.k if isinstance(self.k, str) else round(self.k)
        refuse_small_groups(run.args, round(max(self._k.start, self._k.end)), f"k={written}")

    @hookimpl
    def setup(self, context: SetupContext) -> None:
        """Take the length of the training."""
        self._max_steps = context.max_steps

    @hookimpl
    def advantages(self, rollouts: Rollouts, rewards: Rewards, advantages: Tensor) -> Tensor:
        """(N,) float: those of this rank's completions; groups may reach over ranks."""
        total = judged_total(rewards).double().cpu().view(-1, rollouts.num_generations)  # read group by group
        found, k = torch.zeros_like(total), round(self._k(rollouts.step / self._max_steps))
        for group, place in zip(total, found, strict=True):
            judged = ~group.isnan()
            if int(judged.sum()) >= k:
                place[judged] = self.of_group(group[judged], k)
        return found.flatten()[rewards.local].to(advantages)
