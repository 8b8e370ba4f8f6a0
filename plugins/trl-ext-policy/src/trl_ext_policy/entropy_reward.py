"""`entropy-reward`: a token's reward by its share of the group's entropy at its position (GTPO of arXiv 2508.04349).

For right completions i and wrong ones j, of which d_t and h_t reach position t (eq. 3 and 5):

    r_it =  1 + alpha d_t H_it / sum_k H_kt                 k over the right completions
    r_jt = -1 - alpha h_t (1 / H_jt) / sum_k (1 / H_kt)     k over the wrong ones

    A_it = (r_it - mean r) / std r    over all tokens of the group's right completions, and of its wrong ones (eq. 6)

Uncertain tokens of right completions gain, and confident ones of wrong completions lose. The constants cancel in eq. 6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trl_ext import hookimpl
from trl_ext.groups import EPSILON, judged_total
from trl_ext.records import Rewards, Rollouts, RunDescription
from trl_ext_policy.gathered import AllTokens
from trl_ext_policy.relations import ALONE, NEW_ADVANTAGES
from trl_ext_policy.run_checks import refuse_other_sums

NEAR_ZERO = 1e-8
"""Added to an entropy that is divided by (remark 2.1)."""


def standardized_shares(weights: Tensor, mask: Tensor) -> Tensor:
    """(n, T) float: n_t w_it / sum_k w_kt, minus its mean and over its spread of all tokens.

    Args:
        weights: (n, T) float above 0, of n completions of one kind.
        mask: (n, T) bool: the tokens that count.
    """
    weights = torch.where(mask, weights, 0)
    shares = mask.sum(dim=0) * weights / weights.sum(dim=0).clamp(min=torch.finfo(weights.dtype).tiny)
    count = mask.sum().clamp(min=1)
    centered = torch.where(mask, shares - shares.sum() / count, 0)
    return centered / ((centered**2).sum().div(count).sqrt() + EPSILON)


@dataclass(eq=False)
class EntropyReward:
    """Advantages per token from the entropy that right and wrong completions of a group have at each position.

    In the paper this method is called GTPO, as is the one of arXiv 2508.03772, the plugin `gtpo`. As eq. 6 has it, the
    advantages of right completions have mean 0, and so have those of wrong ones: the mean reward of a completion does
    not act. Where there is one completion of a kind, its advantages are 0. Groups that are all right or all wrong have
    advantages of 0 too, as in DAPO, which leaves them out. Beside the spread stands TRL's 1e-4.

    Args:
        success: reward from which a completion counts as right.
    """

    requires_api: ClassVar[str] = ">=1.5,<2"
    trainers: ClassVar[tuple[str, ...]] = ("grpo",)
    rollout_outputs: ClassVar[tuple[str, ...]] = ("entropy",)
    citation: ClassVar[str] = "Tan et al., GTPO and GRPO-S: Reward Shaping with Policy Entropy, arXiv 2508.04349"
    cost: ClassVar[str] = "a forward of the completions, unless TRL computes old log-probabilities anyway"
    provides: ClassVar[tuple[str, ...]] = (NEW_ADVANTAGES,)
    conflicts: ClassVar[Mapping[str, str]] = ALONE

    success: float = 1.0

    @hookimpl
    def check(self, run: RunDescription) -> None:
        """Refuse advantages of other sums."""
        refuse_other_sums(run.args)

    @hookimpl
    def advantages(self, rollouts: Rollouts, rewards: Rewards, advantages: Tensor) -> Tensor:
        """(N, T) float: A_it of this rank's completions; groups may reach over ranks. Collective."""
        every = AllTokens.of(rollouts)
        total, entropy = judged_total(rewards), every.entropy + NEAR_ZERO
        kinds = total >= self.success, total < self.success  # neither where no function judged
        shaped = torch.zeros_like(entropy)
        for rows in torch.arange(len(total), device=total.device).split(rollouts.num_generations):
            right, wrong = (rows[kind[rows]] for kind in kinds)
            if len(right) and len(wrong):
                shaped[right] = standardized_shares(entropy[right], every.mask[right])
                shaped[wrong] = -standardized_shares(1 / entropy[wrong], every.mask[wrong])
        return shaped[rewards.local, : rollouts.mask.shape[1]].to(advantages)
