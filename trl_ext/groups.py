"""GRPO's groups of completions: what rewards say of each completion, and TRL's advantages for groups of any size."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import Rewards

EPSILON = 1e-4
"""TRL's, beside a group's standard deviation."""


def judged_total(rewards: Rewards) -> Tensor:
    """(N x ranks,) float: the weighted sum of the functions that judged a completion; NaN where none did."""
    return rewards.total.masked_fill(rewards.per_function.isnan().all(dim=1), float("nan"))


def group_advantages(rewards: Tensor, labels: Tensor, scale: str) -> Tensor:
    """(N,) float: TRL's advantages of a sum of rewards, for groups of any size n_g.

        A_i = (R_i - mean_g R) / (s + 1e-4),    s² = 1/(n_g - 1) sum_{j in g} (R_j - mean_g R)²

    (arXiv 2402.03300, section 4.1, with TRL's unbiased variance and 1e-4.) Means and n_g are over the completions of a
    group that have a reward.

    Args:
        rewards: (N,) float; NaN for a completion that counts nowhere and gets 0.
        labels: (N,) long: the group of each.
        scale: TRL's `scale_rewards`: "group" divides by the group's standard deviation, "batch" by that of all, "none"
            by nothing.
    """
    import torch

    judged = ~rewards.isnan()
    values = rewards.nan_to_num(0.0)

    def per_group(x: Tensor) -> Tensor:
        return torch.zeros(int(labels.max()) + 1, dtype=x.dtype, device=x.device).index_add(0, labels, x)

    counts = per_group(judged.to(values.dtype))
    mean = (per_group(values) / counts.clamp(min=1))[labels]
    centered = torch.where(judged, values - mean, 0)
    if scale == "none":
        return centered
    if scale == "batch":
        std = values[judged].std() if int(judged.sum()) > 1 else torch.zeros_like(values[:1])
    else:
        std = (per_group(centered**2) / (counts - 1).clamp(min=1)).sqrt()[labels]
    return centered / (std + EPSILON)
