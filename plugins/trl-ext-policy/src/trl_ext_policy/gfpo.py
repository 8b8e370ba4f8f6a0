"""`gfpo`: sample more, and learn from the k best of a group by length or by reward per token (arXiv 2508.09726).

With the subset S of a group's G completions that ranks highest, eq. 2:

    A_i = (R_i - mean_S R) / std_S R    for i in S,    and 0 for the others

    metric="length"        ranks by -|o_i|
    metric="efficiency"    ranks by R_i / |o_i|
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from accelerate.utils import gather
from torch import Tensor

from trl_ext import hookimpl
from trl_ext.groups import group_advantages, judged_total
from trl_ext.options import Range
from trl_ext.ranks import on_every_rank
from trl_ext.records import Rewards, Rollouts, RunDescription
from trl_ext_policy.relations import ALONE, NEW_ADVANTAGES
from trl_ext_policy.run_checks import refuse_other_sums, refuse_small_groups

Metric = Literal["length", "efficiency"]


def retained(rewards: Tensor, lengths: Tensor, k: int, metric: Metric) -> Tensor:
    """(groups, G) bool: the k completions of each group that rank highest, of equal ones the first.

    Args:
        rewards: (groups, G) float; NaN where no reward function judged, which is never retained.
        lengths: (groups, G) tokens that the loss sees; a completion without any is never retained.
        k: how many.
        metric: see the module.
    """
    score = -lengths.to(rewards.dtype) if metric == "length" else rewards / lengths
    usable = ~rewards.isnan() & (lengths > 0)
    order = torch.where(usable, score, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return usable & (order.argsort(dim=1) < k)


@dataclass(eq=False)
class GFPO:
    """Group filtered policy optimization: advantages among the k shortest completions of a group, 0 for the others.

    The spread is TRL's, as `scale_rewards` has it: unbiased and with 1e-4 beside it, where the paper divides by k. The
    denominators of the loss count all completions, retained or not, as in eq. 2.

    Args:
        k: completions of a group to learn from; the paper's main setting is 8 of 16.
        metric: "length" retains the shortest, "efficiency" those with the most reward per token.
    """

    requires_api: ClassVar[str] = "1"
    trainers: ClassVar[tuple[str, ...]] = ("grpo",)
    citation: ClassVar[str] = (
        "Shrivastava et al., Sample More to Think Less (GFPO), arXiv 2508.09726; asked for in huggingface/trl#3989"
    )
    cost: ClassVar[str] = "none that can be measured; larger groups cost their generation"
    provides: ClassVar[tuple[str, ...]] = (NEW_ADVANTAGES,)
    conflicts: ClassVar[Mapping[str, str]] = ALONE

    k: Annotated[int, Range(ge=2)] = 8
    metric: Metric = "length"

    def __post_init__(self) -> None:
        self._scale = "group"

    @hookimpl
    def check(self, run: RunDescription) -> None:
        """Refuse groups of which all completions would be retained."""
        refuse_other_sums(run.args)
        refuse_small_groups(run.args, self.k + 1, f"k={self.k}, which leaves out at least one,")
        self._scale = run.args.scale_rewards

    @hookimpl
    def advantages(self, rollouts: Rollouts, rewards: Rewards) -> Tensor:
        """(N,) float: A_i of this rank's completions; groups may reach over ranks. Collective."""
        total, n = judged_total(rewards), rollouts.num_generations
        lengths = gather(on_every_rank(lambda: rollouts.mask.sum(dim=1)))
        keep = retained(total.view(-1, n), lengths.view(-1, n), self.k, self.metric).flatten()
        labels = torch.arange(len(total), device=total.device) // n
        return group_advantages(total.masked_fill(~keep, torch.nan), labels, self._scale)[rewards.local]
