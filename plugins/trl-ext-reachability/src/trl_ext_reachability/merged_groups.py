"""GRPO's advantages where several groups of one prompt are taken as one large group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPSILON = 1e-4
"""TRL's, beside a group's standard deviation."""


def group_labels(prompts: Sequence[int], merged: Sequence[bool], num_generations: int) -> Tensor:
    """(N,) long: which group each completion's advantage is taken in, all groups of a merged prompt being one.

    Args:
        prompts: (N,) number of each completion's prompt, in groups.
        merged: (N,) whether groups of this prompt are one.
        num_generations: completions of a group as it was drawn.
    """
    first: dict[int, int] = {}
    return torch.tensor(
        [
            first.setdefault(prompt, i // num_generations) if one else i // num_generations
            for i, (prompt, one) in enumerate(zip(prompts, merged, strict=True))
        ]
    )


def group_advantages(rewards: Tensor, labels: Tensor, scale: str) -> Tensor:
    """(N,) float: TRL's advantages of a sum of rewards, for groups of any size n_g.

        A_i = (R_i - mean_g R) / (s + 1e-4),    s² = 1/(n_g - 1) sum_{j in g} (R_j - mean_g R)²

    (arXiv 2402.03300, section 4.1, with TRL's unbiased variance and 1e-4.) Means and n_g are over the completions of a
    group that some reward function judged.

    Args:
        rewards: (N,) float; NaN where no reward function judged, which counts nowhere and gets 0.
        labels: (N,) long: the group of each.
        scale: TRL's `scale_rewards`: "group" divides by the group's standard deviation, "batch" by that of all.
    """
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
