"""Groups that reach over two ranks: advantages from the rewards and completions of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracles
import pytest
from policy_runs import Seen, binary_reward, checksum_reward, grpo
from trl_ext_policy.gfpo import GFPO
from trl_ext_policy.pass_at_k import PassAtK
from trl_ext_policy.pkpo import PKPO

from trl_ext.testing.ranks import on_ranks

METHODS: dict[str, Any] = {
    "gfpo": (GFPO(k=5), checksum_reward),
    "pkpo": (PKPO(k=3), checksum_reward),
    "pass-at-k": (PassAtK(k=2), binary_reward),
}


def expected(name: str, rewards: list[float], lengths: list[int]) -> list[float]:
    """Of one group of eight."""
    if name == "gfpo":
        keep = oracles.retained(rewards, lengths, 5, "length")
        filtered = [r if kept else None for r, kept in zip(rewards, keep, strict=True)]
        return oracles.grpo(filtered, "group", filtered)
    if name == "pkpo":
        return oracles.best_of_sets(rewards, 3)
    return oracles.sets_as_samples([r >= 1 for r in rewards], 2)


def run_all(folder: Path) -> dict[str, list[Any]]:
    """Rewards, lengths and advantages of this rank's four rows, of each step, by method."""
    found = {}
    for name, (plugin, reward) in METHODS.items():
        seen = Seen()
        settings = {"per_device_train_batch_size": 4, "num_generations": 8, "rank_check_steps": 1, "reward": reward}
        grpo(folder / name, [plugin, seen], **settings).train()
        found[name] = [
            (rewards.total[rewards.local].tolist(), rollouts.mask.sum(dim=1).tolist(), advantages.tolist())
            for rollouts, rewards, advantages in seen.batches
        ]
    return found


@pytest.mark.slow
def test_a_group_on_two_ranks_is_one_group(tmp_path: Path) -> None:
    first, second = on_ranks(run_all, tmp_path)
    for name in METHODS:
        assert len(first[name]) == 3
        differing = 0
        for mine, theirs in zip(first[name], second[name], strict=True):
            rewards, lengths, advantages = (a + b for a, b in zip(mine, theirs, strict=True))
            # TRL's rewards are in fp32.
            assert advantages == pytest.approx(expected(name, rewards, lengths), rel=1e-5, abs=1e-5)
            differing += any(advantages)
        assert differing, f"{name}: no step had an advantage"
