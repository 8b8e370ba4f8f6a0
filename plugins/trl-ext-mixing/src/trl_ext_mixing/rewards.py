"""What rewards say about prompts: which completions solve theirs, and which groups carry a signal."""

from __future__ import annotations

import torch
from torch import Tensor

from trl_ext.records import Rewards


def solved(rewards: Rewards, name: str, threshold: float) -> Tensor:
    """(N x ranks,) bool: whether each completion solves its prompt.

    Args:
        rewards: of all ranks.
        name: the reward function that decides; the weighted sum of all where empty.
        threshold: value from which a completion counts as solved.

    Raises:
        ValueError: no reward function of this name.
    """
    if not name:
        return rewards.total >= threshold
    if name not in rewards.names:
        raise ValueError(f"reward={name!r} is not one of the reward functions: {', '.join(rewards.names)}")
    return rewards.per_function[:, rewards.names.index(name)] >= threshold


def pass_rates(rewards: Rewards, num_generations: int, name: str, threshold: float) -> Tensor:
    """(prompts of all ranks,) float: the share of each prompt's completions that solve it."""
    return solved(rewards, name, threshold).float().view(-1, num_generations).mean(dim=1)


def all_groups_equal(rewards: Rewards, num_generations: int, summed: bool) -> bool:
    """Whether every group on every rank has only equal rewards, so that none says which completion is better.

    Args:
        rewards: of all ranks.
        num_generations: completions of a group.
        summed: whether advantages are made of the weighted sum; of each function otherwise.
    """
    values = rewards.total.unsqueeze(1) if summed else torch.nan_to_num(rewards.per_function, nan=torch.inf)
    groups = values.view(-1, num_generations, values.shape[1])
    return bool((groups == groups[:, :1]).all())
