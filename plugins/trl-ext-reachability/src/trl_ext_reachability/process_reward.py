"""`process-reward`: an advantage for each step of a completion, from a verifier that rewards steps.

For a completion y of the steps y_1 ... y_S, with rewards r_1 ... r_S, the policy gradient of arXiv 2603.06957 (section
on process rewards) is

    sum_i A_i grad log p(y_i | x, y_<i),    A_i = r_i,    r_i = 1[y_1:i = y*_1:i],

where log p of a step is the sum over its tokens, so that each token has the advantage of its step. A_i is the reward
itself and not the return to go, and a wrong step has 0, or -1 as in the authors' experiments. Options change that:

    normalize="center"    A_i = r_i - m           m  = 1/G sum_c mean_i r_ci
    normalize="group"     A_i = (r_i - m) / (s + 1e-4)    s² = 1/(G-1) sum_c mean_i (r_ci - m)²
    return_to_go=true     A_i <- sum_{j >= i} A_j
    outcome=w             A_i <- A_i + w A,       A: the advantages before this plugin, those of the outcome
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from accelerate.utils import gather
from torch import Tensor

from trl_ext import hookimpl
from trl_ext.groups import EPSILON
from trl_ext.records import Rewards, Rollouts, RunDescription, SetupContext
from trl_ext_reachability.relations import AFTER, ALONE, NEW_ADVANTAGES, declare
from trl_ext_reachability.step_rewards import StepJudge
from trl_ext_reachability.step_verification import StepVerification

Normalize = Literal["none", "center", "group"]


def normalized(rewards: Tensor, mask: Tensor, num_generations: int, local: slice, how: Normalize) -> Tensor:
    """(N, S) float: step rewards, centred and scaled within groups over all ranks. Collective unless `how` is "none".

    The denominators are G and G - 1, the completions of the group that have a judged step: a completion weighs as much
    as any other, evenly spread over its steps. So where the steps of each completion share one reward, the result is
    TRL's advantage of a completion with that reward.

    Args:
        rewards: (N, S) float, of this rank's completions; groups may reach over ranks.
        mask: (N, S) bool: the steps that were judged.
        num_generations: Completions of a group as it was drawn.
        local: This rank's rows among those of all ranks.
        how: "center" subtracts the group's mean m, "group" divides by its standard deviation s too.
    """
    if how == "none":
        return rewards

    def of_groups(steps: Tensor) -> Tensor:
        """(groups,) sum over the completions of each group of the mean over their judged steps."""
        means = torch.where(mask, steps, 0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        return gather(means).view(-1, num_generations).sum(dim=1)

    def to_rows(groups: Tensor) -> Tensor:
        return groups.repeat_interleave(num_generations)[local].unsqueeze(1)

    size = gather(mask.any(dim=1).float()).view(-1, num_generations).sum(dim=1)
    centered = rewards - to_rows(of_groups(rewards) / size.clamp(min=1))
    if how == "center":
        return centered
    variance = of_groups(centered**2) / (size - 1).clamp(min=1)
    return centered / (to_rows(variance.sqrt()) + EPSILON)


def return_to_go(rewards: Tensor, mask: Tensor) -> Tensor:
    """(N, S) sum of the rewards of each step and those after it."""
    return torch.where(mask, rewards, 0).flip(1).cumsum(1).flip(1)


@dataclass(eq=False)
class ProcessReward(StepVerification):
    """Advantages (B, T) from rewards of steps; A_i = r_i by default, as the paper defines them.

    Args:
        verifier: "steps" compares with a reference solution (`trl_ext_reachability.verifiers.StepChecker`), "model"
            asks a process reward model (`trl_ext_reachability.step_classifier.StepClassifier`); otherwise a function,
            `package.module:function`, called as `trl_ext_reachability.verifiers` says.
        split: What a step is: what a delimiter ends, a turn of the model, or a token.
        delimiter: Ends a step.
        solution: Column with the reference solution ("steps").
        pattern: Regular expression for what counts of a step: its last match ("steps"). The whole step where None.
        wrong: Reward of a wrong step ("steps"); the authors' experiments take -1.
        model: Path or hub id of a model for token classification ("model").
        separator: Ends the steps that this model reads, as in its training ("model").
        normalize: "none", "center" (minus the group's mean) or "group" (and over its standard deviation).
        return_to_go: Whether a token gets the rewards of later steps too, after normalising.
        outcome: Weight of the advantages before this plugin, those from the reward functions, which are added.
    """

    requires_api: ClassVar[str] = "1"
    trainers: ClassVar[tuple[str, ...]] = ("grpo",)
    citation: ClassVar[str] = (
        "Post-training with policy gradients: optimality and the base model barrier, arXiv 2603.06957 (process rewards)"
    )
    cost: ClassVar[str] = "the verifier's time"
    provides: ClassVar[tuple[str, ...]] = (NEW_ADVANTAGES,)
    conflicts: ClassVar[Mapping[str, str]] = ALONE

    normalize: Normalize = "none"
    return_to_go: bool = False
    outcome: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.outcome):
            raise ValueError(f"outcome={self.outcome}: a finite weight")
        if self.outcome:
            declare(self, provides=(), conflicts={}, after=AFTER)
        self._judge: StepJudge | None = None
        self._seen: dict[str, list[tuple[float, float, float]]] = {"train": [], "eval": []}

    @hookimpl
    def check(self, run: RunDescription) -> None:
        """Refuse a data set whose columns do not fit the verifier."""
        self.check_columns(run)

    @hookimpl
    def setup(self, context: SetupContext) -> None:
        """Make the verifier, which needs the tokenizer."""
        self._judge = self.make_judge(context)

    @hookimpl
    def advantages(self, rollouts: Rollouts, rewards: Rewards, advantages: Tensor) -> Tensor:
        """(N, T) float: A_i at each token of step i; 0 outside of the mask, and where the verifier did not judge."""
        if self._judge is None:
            raise RuntimeError("steps need the tokenizer, which training sets up: evaluate after train(), or in it")
        given = self._judge(rollouts)
        self._seen["train" if rollouts.training else "eval"] += given.statistics()
        steps = normalized(given.values, given.mask, rollouts.num_generations, rewards.local, self.normalize)
        if self.return_to_go:
            steps = return_to_go(steps, given.mask)
        tokens = given.per_token(steps, rollouts.mask.shape[1])
        if self.outcome:
            tokens += self.outcome * (advantages.unsqueeze(1) if advantages.dim() == 1 else advantages)
        return tokens * rollouts.mask

    @hookimpl
    def metrics(self, mode: str) -> dict[str, float]:
        """This rank's mean step reward, number of steps, and share of completions whose steps all have 1 or more."""
        seen, self._seen[mode] = self._seen[mode], []
        columns = zip(*seen, strict=True)
        return {name: sum(c) / len(c) for name, c in zip(("reward", "steps", "all_right"), columns, strict=False)}
