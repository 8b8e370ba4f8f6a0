"""`pkpo`: the unbiased gradient of pass@k, and of the best reward of k, with a baseline of k - 1 (arXiv 2505.15201).

The gradient of E max(g(x_1), ..., g(x_k)) is estimated by sum_i s_i grad log p(x_i), where n s_i / k is what
completion i adds to the best of k - 1 others, as a mean over all such sets J of them (eq. 33, "s^(loo-1)"):

    A_i = n s_i = k mean_J max(0, g_i - max_{j in J} g_j)
        = k sum_j C(j, k-2) / C(n-1, k-1) max(0, g_i - g_(j)),    g_(0) <= ... <= g_(n-1)

GRPO takes a mean over the n completions of a prompt, hence the factor n. With rewards of 0 and 1, of which c are 1:

    A_i = k C(n-c, k-1) / C(n-1, k-1)    for a right completion,    and 0 for a wrong one

There are no sets of k - 1 for k = 1; then the baseline is the mean of the others (eq. 29).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import ClassVar

from torch import Tensor

from trl_ext_policy.sets import SetsOfK


def marginal_gains(rewards: Tensor, k: int) -> Tensor:
    """(n,) double: A_i of a group's rewards (n,) double, for k <= n."""
    n = len(rewards)
    if k == 1:
        return (rewards - rewards.mean()) * (n / max(n - 1, 1))
    best_of_others = rewards.new_tensor([comb(j, k - 2) / comb(n - 1, k - 1) for j in range(n)])
    gains = (rewards.unsqueeze(1) - rewards.sort().values).clamp(min=0)
    return k * (gains * best_of_others).sum(dim=1)


@dataclass(eq=False, kw_only=True)
class PKPO(SetsOfK):
    """Pass@k policy optimization: a completion's advantage is what it adds to the best of k - 1 others.

    Rewards may be any numbers; with 0 and 1 it is pass@k. `scale_rewards` does not act, since a division by the spread
    would make the estimate another one. On average over draws the update is the gradient of pass@k with a loss that
    weighs tokens alike (`loss_type="dr_grpo"`), as long as rollouts are used once.

    Args:
        k: completions of a set, up to `num_generations`, which the paper leaves to the user; a schedule such as
            "linear:8:1" lowers it in the course of the training, as the paper does too.
    """

    citation: ClassVar[str] = "Walder and Karkhanis, Pass@K Policy Optimization (PKPO), arXiv 2505.15201"

    def of_group(self, rewards: Tensor, k: int) -> Tensor:
        return marginal_gains(rewards, k)
