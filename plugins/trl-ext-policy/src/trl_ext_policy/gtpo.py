"""`gtpo`: no penalty on tokens that right and wrong completions share, and less entropy (arXiv 2508.03772).

    A_it = lambda_it delta_i (A_i - gamma <H>_i)

    lambda_it = 0 on conflict tokens of completions with A_i < 0, 2 on those with A_i > 0, and 1 elsewhere
    delta_i   = 0 where <H>_i > ln 2, if the model had a mean entropy below ln 2 at the start, and 1 otherwise

Conflict tokens are shared prefixes and suffixes, see `conflicts`; <H>_i is the mean entropy of a completion's tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from trl_ext import hookimpl
from trl_ext.options import Range
from trl_ext.records import Rewards, Rollouts
from trl_ext_policy.conflicts import conflict_weights
from trl_ext_policy.gathered import AllTokens, all_advantages
from trl_ext_policy.relations import AFTER

THRESHOLD = math.log(2)
"""Nats: the paper's; its code has 0.7."""


@dataclass(eq=False)
class GTPO:
    """Group-relative trajectory-based policy optimization: conflict masks and an entropy filter on advantages.

    With `loss_type="grpo"` and `beta=0` the denominator is the paper's, which has no KL term. The authors' code differs
    from the paper, which is followed here: it divides a completion's loss by its number of conflict tokens too, and
    where prefix and suffix overlap its weight is 4.

    Args:
        gamma: weight of a completion's mean entropy in nats.
    """

    requires_api: ClassVar[str] = ">=1.5,<2"
    trainers: ClassVar[tuple[str, ...]] = ("grpo",)
    rollout_outputs: ClassVar[tuple[str, ...]] = ("entropy",)
    state_version: ClassVar[int] = 1
    citation: ClassVar[str] = (
        "Simoni et al., GTPO: Stabilizing Group Relative Policy Optimization, arXiv 2508.03772; asked for in "
        "huggingface/trl#5226"
    )
    cost: ClassVar[str] = "a forward of the completions, unless TRL computes old log-probabilities anyway"
    after: ClassVar[Mapping[str, str]] = AFTER

    gamma: Annotated[float, Range(ge=0)] = 0.1

    def __post_init__(self) -> None:
        self._start: float | None = None
        self._shares: list[Tensor] = []

    @hookimpl
    def setup(self) -> None:
        """Measure the start of each training anew."""
        self._start, self._shares = None, []

    @hookimpl
    def advantages(self, rollouts: Rollouts, rewards: Rewards, advantages: Tensor) -> Tensor:
        """(N, T) float: A_it of this rank's completions; groups may reach over ranks. Collective."""
        every = AllTokens.of(rollouts)
        given, entropy = all_advantages(advantages), every.mean_entropy()
        groups = zip(*(part.split(rollouts.num_generations) for part in (every.ids, every.mask, given)), strict=True)
        weights = torch.cat([conflict_weights(*group) for group in groups])
        if rollouts.training and self._start is None and every.mask.any():
            self._start = float(entropy[every.mask.any(dim=1)].mean())
        filtered = (entropy > THRESHOLD) & (self._start is not None and self._start < THRESHOLD)
        if rollouts.training:
            conflicts = ((weights != 1) & every.mask).sum() / every.mask.sum().clamp(min=1)
            self._shares.append(torch.stack([conflicts, filtered.float().mean()]))
        shaped = weights * torch.where(filtered, 0, given - self.gamma * entropy).unsqueeze(1)
        return shaped[rewards.local, : rollouts.mask.shape[1]].to(advantages)

    @hookimpl
    def metrics(self, mode: str) -> dict[str, float]:
        """Shares of conflict tokens and of filtered completions since the last log, over all ranks."""
        if mode != "train" or not self._shares:
            return {}
        (conflicts, filtered), self._shares = torch.stack(self._shares).mean(dim=0).tolist(), []
        return {"conflict_tokens": conflicts, "filtered_completions": filtered}

    def state_dict(self) -> dict[str, Any]:
        """The mean entropy at the start, None before it is known."""
        return {"start": self._start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._start = state["start"]
