"""What rewards say about prompts: how often they are solved, and which groups carry a signal.

A reward function gives None where it does not apply, which is NaN in the records. A completion that nobody judged is
neither solved nor failed: pass rates are over the judged ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trl_ext.groups import judged_total
from trl_ext.records import Rewards


def solved(rewards: Rewards, name: str, threshold: float) -> Tensor:
    """Say of each completion whether it solves its prompt.

    Args:
        rewards: of all ranks.
        name: the reward function that decides; the weighted sum of all where empty.
        threshold: value from which a completion counts as solved.

    Returns:
        (N x ranks,) float: 1 or 0, NaN where that function gave None (all functions, where no name is given).

    Raises:
        ValueError: no reward function of this name.
    """
    if name and name not in rewards.names:
        raise ValueError(f"reward={name!r} is not one of the reward functions: {', '.join(rewards.names)}")
    values = rewards.per_function[:, rewards.names.index(name)] if name else judged_total(rewards)
    return (values >= threshold).float().masked_fill(values.isnan(), torch.nan)


def pass_rates(rewards: Rewards, num_generations: int, name: str, threshold: float) -> Tensor:
    """(prompts of all ranks,) float: the share of each prompt's judged completions that solve it; NaN without any."""
    return solved(rewards, name, threshold).view(-1, num_generations).nanmean(dim=1)


def summary(rates: Tensor) -> dict[str, float | Tensor]:
    """Numbers for the log.

    Args:
        rates: (P,) of `pass_rates`.

    Returns:
        `unjudged_prompts`, the share in [0, 1] of prompts without a judged completion; of the others the mean
        `pass_rate` and the share of `solved_prompts`, which are left out where there are no others.
    """
    judged = rates[~rates.isnan()]
    values: dict[str, float | Tensor] = {"unjudged_prompts": 1 - judged.numel() / rates.numel()}
    if judged.numel():
        values |= {"pass_rate": judged.mean(), "solved_prompts": (judged > 0).float().mean()}
    return values


def all_groups_equal(rewards: Rewards, num_generations: int, summed: bool) -> bool:
    """Whether every group on every rank has only equal rewards, so that none says which completion is better.

    Args:
        rewards: of all ranks.
        num_generations: completions of a group.
        summed: whether advantages are made of the weighted sum; of each function otherwise.
    """
    values = judged_total(rewards).unsqueeze(1) if summed else rewards.per_function
    groups = values.view(-1, num_generations, values.shape[1])
    # TRL leaves completions that were not judged out of their group.
    low = groups.nan_to_num(nan=torch.inf).amin(dim=1)
    high = groups.nan_to_num(nan=-torch.inf).amax(dim=1)
    return bool((low >= high).all())
