"""What the methods share that reward a set of k completions for its best one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from trl_ext import hookimpl
from trl_ext.groups import judged_total
from trl_ext.options import Range
from trl_ext.records import Rewards, Rollouts, RunDescription
from trl_ext_policy.relations import ALONE, NEW_ADVANTAGES
from trl_ext_policy.run_checks import refuse_other_sums, refuse_small_groups


@dataclass(eq=False, kw_only=True)
class SetsOfK:
    """Base of the methods whose advantages follow from the rewards of a group and k alone.

    A completion that no reward function judged has advantage 0 and is not counted among its group's n. Where fewer than
    k are left, as in an evaluation with small groups, all have advantage 0.

    Args:
        k: completions of a set.
    """

    k: Annotated[int, Range(ge=2)] = 4

    requires_api: ClassVar[str] = "1"
    trainers: ClassVar[tuple[str, ...]] = ("grpo",)
    cost: ClassVar[str] = "none that can be measured"
    provides: ClassVar[tuple[str, ...]] = (NEW_ADVANTAGES,)
    conflicts: ClassVar[Mapping[str, str]] = ALONE

    def of_group(self, rewards: Tensor) -> Tensor:
        """(n,) double: the advantages of a group whose completions have these rewards, (n,) double, n >= k."""
        raise NotImplementedError

    @hookimpl
    def check(self, run: RunDescription) -> None:
        """Refuse groups that are smaller than a set."""
        refuse_other_sums(run.args)
        refuse_small_groups(run.args, self.k, f"k={self.k}")

    @hookimpl
    def advantages(self, rollouts: Rollouts, rewards: Rewards, advantages: Tensor) -> Tensor:
        """(N,) float: those of this rank's completions; groups may reach over ranks."""
        total = judged_total(rewards).double().cpu().view(-1, rollouts.num_generations)  # read group by group
        found = torch.zeros_like(total)
        for group, place in zip(total, found, strict=True):
            judged = ~group.isnan()
            if int(judged.sum()) >= self.k:
                place[judged] = self.of_group(group[judged])
        return found.flatten()[rewards.local].to(advantages)
