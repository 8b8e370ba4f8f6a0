"""`best-of-m`: draw until correct, up to m times, and learn from the correct completion alone (arXiv 2603.06957).

For a context x with the draws y_1 ... y_m, of which y_k is the first correct one, the update is the gradient of

    1/contexts sum_x log p(y_k | x),    and a context without a correct draw changes nothing.

GRPO takes a mean over m completions per context, so the advantage of y_k is m, and that of all others 0. The paper has
m = min(1/Q, k^N), with the likelihood quantile Q of the base model; here m is `num_generations`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trl_ext import hookimpl
from trl_ext.groups import judged_total
from trl_ext.records import Rewards, Rollouts
from trl_ext_reachability.relations import ALONE, NEW_ADVANTAGES


def first_correct(correct: Tensor, judged: Tensor) -> tuple[Tensor, Tensor]:
    """Which draw is the first correct one, and how many verdicts that took.

    Args:
        correct: (groups, m) bool, in the order of drawing.
        judged: (groups, m) bool: the draws that a reward function judged; no other is correct.

    Returns:
        (groups, m) bool, at most one a group; (groups,) long, the judged draws up to and with it, or all of them.
    """
    found = (correct & judged).cumsum(dim=1)
    first = correct & judged & (found == 1)
    before_or_at = (found == 0) | first
    return first, (judged & before_or_at).sum(dim=1)


@dataclass(eq=False)
class BestOfM:
    """Best-of-m sampling of the paper, with m = `num_generations`: a group's completions are the draws, in order.

    Token means such as "dapo" divide by the tokens of all draws; take `loss_type="dr_grpo"` for the paper's sum over a
    sequence. The queries that are logged are what a sampler would ask that stops at the first correct draw. GRPO draws
    whole groups, so that stopping early saves no generation. `pg:rewards=given` after this plugin leaves out ratio and
    clipping.

    Args:
        success: Reward from which a completion counts as correct.
    """

    requires_api: ClassVar[str] = "1"
    trainers: ClassVar[tuple[str, ...]] = ("grpo",)
    state_version: ClassVar[int] = 1
    citation: ClassVar[str] = (
        "Post-training with policy gradients: optimality and the base model barrier, arXiv 2603.06957 (best of m)"
    )
    cost: ClassVar[str] = "none that can be measured"
    provides: ClassVar[tuple[str, ...]] = (NEW_ADVANTAGES,)
    conflicts: ClassVar[Mapping[str, str]] = ALONE

    success: float = 1.0

    def __post_init__(self) -> None:
        self._total = 0
        self._recent: list[tuple[int, int, int]] = []

    @hookimpl
    def setup(self) -> None:
        """Count from the start of each training."""
        self._total, self._recent = 0, []

    @hookimpl
    def advantages(self, rollouts: Rollouts, rewards: Rewards, advantages: Tensor) -> Tensor:
        """(N,) float: m for the first correct draw of a group, 0 for the others; groups may reach over ranks."""
        m = rollouts.num_generations
        total = judged_total(rewards).view(-1, m)
        judged = ~total.isnan()
        first, queries = first_correct(total >= self.success, judged)
        if rollouts.training:
            contexts, asked, solved = torch.stack([judged.any(dim=1).sum(), queries.sum(), first.sum()]).tolist()
            self._total += asked
            self._recent.append((contexts, asked, solved))
        return (m * first.flatten())[rewards.local].to(advantages)

    @hookimpl
    def metrics(self, mode: str) -> dict[str, float]:
        """Mean queries of a context and share of contexts solved since the last log; all queries of the run so far.

        A context without any verdict counts in neither of the first two.
        """
        if mode != "train" or not self._recent:
            return {}
        contexts, asked, solved = (sum(column) for column in zip(*self._recent, strict=True))
        self._recent = []
        if not contexts:
            return {"queries_total": float(self._total)}
        return {"queries": asked / contexts, "solved": solved / contexts, "queries_total": float(self._total)}

    def state_dict(self) -> dict[str, Any]:
        """Queries so far."""
        return {"total": self._total, "recent": [list(counts) for counts in self._recent]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self._total = state["total"]
        self._recent = [(contexts, asked, solved) for contexts, asked, solved in state["recent"]]
