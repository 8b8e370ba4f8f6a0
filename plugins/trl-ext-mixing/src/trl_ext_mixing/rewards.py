"""What rewards say about prompts: which completions solve theirs, and which groups carry a signal."""

from __future__ import annotations

import torch
from torch import Tensor

from trl_ext.errors import ConfigurationError
from trl_ext.records import Rewards, RunDescription


def refuse_unknown(run: RunDescription, name: str) -> None:
    """Raise where the reward function that shall decide is none of the run's.

    Raises:
        ConfigurationError: naming those that there are.
    """
    if name and run.rewards and name not in run.rewards:
        raise ConfigurationError(f"reward={name!r} is not one of the reward functions: {', '.join(run.rewards)}")


def refuse_undecided(run: RunDescription, name: str) -> None:
    """Raise where what is trained on depends on whether a prompt is solved, and it is not said which reward says so.

    Raises:
        ConfigurationError: naming the choices.
    """
    refuse_unknown(run, name)
    if not name and len(run.rewards) > 1:
        raise ConfigurationError(
            f"with several reward functions, say which one tells whether a prompt is solved: reward={run.rewards[0]} "
            f"(or {', '.join(run.rewards[1:])})"
        )


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
    values = rewards.per_function
    if summed:
        unscored = values.isnan().all(dim=1)
        values = rewards.total.masked_fill(unscored, torch.nan).unsqueeze(1)
    groups = values.view(-1, num_generations, values.shape[1])
    # NaN is no reward: TRL leaves such completions out of their group.
    low = groups.nan_to_num(nan=torch.inf).amin(dim=1)
    high = groups.nan_to_num(nan=-torch.inf).amax(dim=1)
    return bool((low >= high).all())
