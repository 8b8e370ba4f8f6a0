"""`gfpo`: against algorithm 1 over lists, and against TRL where every completion is retained."""

from __future__ import annotations

import random
from typing import Any

import policy_oracles as oracles
import pytest
import torch
from trl_ext_policy.gfpo import GFPO

from trl_ext.records import Rewards, Rollouts


def advantages(plugin: GFPO, rewards: list[float | None], lengths: list[int], size: int, scale: str) -> list[float]:
    """Through the hook."""
    values = torch.tensor([[torch.nan if r is None else r] for r in rewards], dtype=torch.float64)
    mask = torch.tensor([[int(t < length) for t in range(9)] for length in lengths])
    record = Rewards(values, ("reward",), torch.ones(1), slice(0, len(rewards)))
    plugin._scale = scale
    return plugin.advantages(Rollouts([], [], [], mask, mask, mask, mask, size, 0, True), record).tolist()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("metric", ["length", "efficiency"])
@pytest.mark.parametrize("k", [2, 4, 6])
def test_advantages_are_those_of_the_retained(scale: str, metric: Any, k: int) -> None:
    """Random groups of 6, with rewards of None, lengths of 0 (a masked truncated completion), and ties."""
    rng = random.Random(k)
    for _ in range(20):
        rewards = [rng.choice([None, 0.0, 1.0, -0.5, rng.random()]) for _ in range(18)]
        lengths = [rng.randrange(0, 8) for _ in range(18)]
        groups = range(0, 18, 6)
        kept = [keep for g in groups for keep in oracles.retained(rewards[g : g + 6], lengths[g : g + 6], k, metric)]
        filtered = [r if keep else None for r, keep in zip(rewards, kept, strict=True)]
        expected = [a for g in groups for a in oracles.grpo(filtered[g : g + 6], scale, filtered)]
        found = advantages(GFPO(k=k, metric=metric), rewards, lengths, 6, scale)
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_the_shortest_two_of_four_by_hand() -> None:
    """Retained are the first and the last: R = 1 and 0, mean 0.5, unbiased spread 0.7071."""
    found = advantages(GFPO(k=2), [1.0, 1.0, 0.0, 0.0], [2, 5, 6, 3], 4, "group")
    assert found == pytest.approx([0.5 / (0.5**0.5 + 1e-4), 0, 0, -0.5 / (0.5**0.5 + 1e-4)])


def test_reward_per_token_may_retain_a_long_completion() -> None:
    found = advantages(GFPO(k=2, metric="efficiency"), [1.0, 0.0, 0.2, 0.0], [5, 1, 2, 2], 4, "none")
    assert found == pytest.approx([0.4, 0, -0.4, 0])


def test_equal_rewards_teach_nothing() -> None:
    assert advantages(GFPO(k=2), [0.3] * 4, [1, 2, 3, 4], 4, "group") == [0] * 4
