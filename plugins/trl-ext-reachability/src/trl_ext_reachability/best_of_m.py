"""`best-of-m`: draw until correct, up to m times, and learn from the correct completion alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from trl_ext import hookimpl
from trl_ext.records import Rewards, Rollouts, RunDescription
from trl_ext_reachability.precedence import refuse_overwriting


def first_correct(correct: Tensor) -> tuple[Tensor, Tensor]:
    """Which draw is the first correct one, and how many draws that took.

    Args:
        correct: (groups, m) bool, in the order of drawing.

    Returns:
        (groups, m) bool, at most one a group; (groups,) long, from 1, m without a correct draw.
    """
    first = correct & (correct.cumsum(dim=1) == 1)
    m = correct.shape[1]
    places = torch.arange(1, m + 1, device=correct.device).expand_as(correct)
    return first, torch.where(correct, places, m).min(dim=1).values


@dataclass(eq=False)
class BestOfM:
    """Best-of-m sampling of the paper, with m = `num_generations`: a group's completions are the draws, in order.

    The first correct completion has the advantage m, all others 0, so that TRL's mean over completions is the paper's
    mean over contexts, with the gradient of log p of the accepted draw. A context without a correct draw changes
    nothing. Token means such as "dapo" divide by the tokens of all draws; take `loss_type="dr_grpo"` for the paper's
    sum over a sequence.

    The queries logged are what a sampler would ask that stops at the first correct draw. GRPO draws groups as a whole,
    so that no generation is saved. `pg:rewards=given` after this plugin leaves out ratio and clipping.

    Args:
        success: Reward from which a completion counts as correct.
    """

    requires_api: ClassVar[str] = "1"
    trainers: ClassVar[tuple[str, ...]] = ("grpo",)
    state_version: ClassVar[int] = 1
    citation: ClassVar[str] = (
        "Post-training with policy gradients: optimality and the base model barrier, arXiv 2603.06957 (best of m)"
    )

    success: float = 1.0
    _total: int = field(default=0, init=False, repr=False)
    _recent: list[tuple[int, int, int]] = field(default_factory=list, init=False, repr=False)

    @hookimpl
    def check(self, run: RunDescription) -> None:
        """Refuse plugins before this one whose advantages it would replace."""
        advice = {
            "reachability": "name best-of-m before reachability",
            "process-reward": "keep one of the two, or name best-of-m first and set process-reward:outcome=1",
        }
        refuse_overwriting(run, "best-of-m", advice)

    @hookimpl
    def advantages(self, rollouts: Rollouts, rewards: Rewards, advantages: Tensor) -> Tensor:
        """(N,) m or 0; groups may reach over ranks."""
        m = rollouts.num_generations
        # TRL's total is 0 where every function returned None.
        judged = ~rewards.per_function.isnan().all(dim=1)
        first, queries = first_correct(((rewards.total >= self.success) & judged).view(-1, m))
        if rollouts.training:
            asked = int(queries.sum())
            self._total += asked
            self._recent.append((len(queries), asked, int(first.sum())))
        return (m * first.flatten())[rewards.local].to(advantages)

    @hookimpl
    def metrics(self, mode: str) -> dict[str, float]:
        """Mean queries of a context and share of contexts solved since the last log; all queries of the run so far."""
        if mode != "train" or not self._recent:
            return {}
        contexts, asked, solved = (sum(column) for column in zip(*self._recent, strict=True))
        self._recent = []
        return {"queries": asked / contexts, "solved": solved / contexts, "queries_total": float(self._total)}

    def state_dict(self) -> dict[str, Any]:
        """Queries so far."""
        return {"total": self._total, "recent": [list(counts) for counts in self._recent]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self._total = state["total"]
        self._recent = [(contexts, asked, solved) for contexts, asked, solved in state["recent"]]
