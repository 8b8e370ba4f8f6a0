"""Groups that reach over two ranks: advantages from the rewards and completions of both."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import policy_oracles as oracles
import pytest
import torch
from policy_runs import Seen, binary_reward, checksum_reward, grpo, stopping_model
from trl_ext_policy.entropy_reward import EntropyReward
from trl_ext_policy.gfpo import GFPO
from trl_ext_policy.gtpo import GTPO
from trl_ext_policy.pass_at_k import PassAtK
from trl_ext_policy.pkpo import PKPO

from trl_ext.testing.ranks import on_ranks

METHODS: dict[str, Any] = {
    "gfpo": (GFPO(k=5), checksum_reward),
    "pkpo": (PKPO(k=3), checksum_reward),
    "pass-at-k": (PassAtK(k=2), binary_reward),
    "gtpo": (GTPO(), binary_reward),
    "entropy-reward": (EntropyReward(), binary_reward),
}


@dataclass
class Row:
    """What one completion and its rank know of it."""

    tokens: list[int]
    entropy: list[float]
    reward: float
    given: float
    """TRL's advantage."""
    found: list[float]
    """The method's, of each token, or one alone."""


def rows_of(before: Seen, after: Seen) -> list[list[Row]]:
    """Of each step; the hooks of the two are around the method's."""
    steps = []
    for (rollouts, rewards, given), (_, _, found) in zip(before.batches, after.batches, strict=True):
        entropy = torch.zeros_like(rollouts.mask) if rollouts.entropy is None else rollouts.entropy
        columns = (rollouts.completion_ids, entropy, rewards.total[rewards.local], given, found)
        keep = rollouts.mask.bool()
        steps.append(
            [
                Row(ids[m].tolist(), h[m].tolist(), float(r), float(a), x[m].tolist() if x.dim() else [float(x)])
                for ids, h, r, a, x, m in zip(*columns, keep, strict=True)
            ]
        )
    return steps


def expected(name: str, group: list[Row], start: float) -> list[list[float]]:
    """Of one group of eight; `start` is the mean entropy of the first step."""
    rewards, right = [row.reward for row in group], [row.reward >= 1 for row in group]
    entropies = [row.entropy for row in group]
    if name == "gtpo":
        return oracles.gtpo([row.tokens for row in group], entropies, [row.given for row in group], 0.1, start)
    if name == "entropy-reward":
        return oracles.entropy_rewards(entropies, right, 0.1)
    if name == "gfpo":
        keep = oracles.retained(rewards, [len(row.tokens) for row in group], 5, "length")
        filtered = [r if kept else None for r, kept in zip(rewards, keep, strict=True)]
        found = oracles.grpo(filtered, "group", filtered)
    else:
        found = oracles.best_of_sets(rewards, 3) if name == "pkpo" else oracles.sets_as_samples(right, 2)
    return [[advantage] for advantage in found]


def run_all(folder: Path) -> dict[str, list[list[Row]]]:
    """This rank's four rows of each step, by method."""
    found = {}
    for name, (plugin, reward) in METHODS.items():
        before, after = Seen("before"), Seen("after")
        settings = {"per_device_train_batch_size": 4, "num_generations": 8, "rank_check_steps": 1, "reward": reward}
        grpo(folder / name, [before, plugin, after], model=stopping_model(sharpness=10), **settings).train()
        found[name] = rows_of(before, after)
    return found


@pytest.mark.slow
def test_a_group_on_two_ranks_is_one_group(tmp_path: Path) -> None:
    first, second = on_ranks(run_all, tmp_path)
    for name in METHODS:
        groups = [mine + theirs for mine, theirs in zip(first[name], second[name], strict=True)]
        assert len(groups) == 3
        lengths = {len(row.tokens) for group in groups for row in group}
        assert len(lengths) > 1
        start = statistics.fmean(statistics.fmean(row.entropy) for row in groups[0])
        for group in groups:
            for row, values in zip(group, expected(name, group, start), strict=True):
                # TRL's rewards and entropies are in fp32.
                assert row.found == pytest.approx(values, rel=1e-4, abs=2e-4), name
        assert any(any(row.found) for group in groups for row in group), f"{name}: no step had an advantage"
