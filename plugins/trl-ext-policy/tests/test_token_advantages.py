"""`gtpo` and `entropy-reward`: against loops over tokens, and inside of runs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import policy_oracles as oracles
import pytest
import torch
from policy_runs import Seen, binary_reward, grpo
from trl_ext_policy.conflicts import conflict_weights
from trl_ext_policy.entropy_reward import EntropyReward
from trl_ext_policy.gtpo import GTPO

from trl_ext.errors import ConfigurationError, PluginError
from trl_ext.records import Rewards, Rollouts


def padded(rows: list[list[Any]], fill: Any, length: int = 0) -> torch.Tensor:
    length = max(length, *map(len, rows))
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])


def rolled(completions: list[list[int]], entropies: list[list[float]], size: int, length: int = 0) -> Rollouts:
    ids, mask = padded(completions, 0, length), padded([[1] * len(c) for c in completions], 0, length)
    entropy = padded(entropies, 9.0, length)  # what stands on padding must not count
    return Rollouts([], [], [], ids, mask, ids, mask, size, 0, True, entropy=entropy)


def judged(rewards: list[float | None], rows: slice | None = None) -> Rewards:
    values = torch.tensor([[torch.nan if r is None else r] for r in rewards])
    return Rewards(values, ("reward",), torch.ones(1), rows or slice(0, len(rewards)))


def drawn(rng: random.Random, size: int, tokens: int = 2) -> tuple[list[list[int]], list[list[float]]]:
    """Completions over few tokens, so that prefixes and suffixes are shared; some are empty."""
    lengths = [rng.randrange(0, 7) for _ in range(size)]
    completions = [[rng.randrange(tokens) for _ in range(n)] for n in lengths]
    return completions, [[0.05 + rng.random() for _ in range(n)] for n in lengths]


def test_conflict_tokens_by_hand() -> None:
    """Right: 1 2 3 4 9. Wrong: 1 2 5 9 and 7 2 9. Prefix 1 2 and suffix 9 of the first two; the suffix of the third."""
    ids = padded([[1, 2, 3, 4, 9], [1, 2, 5, 9], [7, 2, 9]], 0)
    weights = conflict_weights(ids, ids != 0, torch.tensor([1.0, -0.5, -0.5]))
    assert weights.tolist() == [[2, 2, 1, 1, 2], [0, 0, 1, 0, 1], [1, 1, 0, 1, 1]]


@pytest.mark.parametrize("seed", range(30))
def test_conflict_weights_are_those_of_a_walk(seed: int) -> None:
    rng = random.Random(seed)
    completions, _ = drawn(rng, 6)
    advantages = [rng.choice([-1.0, 0.0, 0.5]) for _ in completions]
    ids, mask = padded(completions, 0), padded([[True] * len(c) for c in completions], False)
    found = conflict_weights(ids, mask, torch.tensor(advantages))
    expected = oracles.conflict_weights(completions, advantages)
    assert [row[: len(c)] for row, c in zip(found.tolist(), completions, strict=True)] == expected
    assert (found[~mask] == 1).all()


def test_a_masked_token_ends_a_run() -> None:
    """What a tool wrote is no token of the policy."""
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])
    mask = torch.tensor([[True, False, True, True]] * 2)
    weights = conflict_weights(ids, mask, torch.tensor([1.0, -1.0]))
    assert weights.tolist() == [[2, 1, 2, 2], [0, 1, 0, 0]]


@pytest.mark.parametrize("start", [0.3, 2.0])
@pytest.mark.parametrize("seed", range(5))
def test_gtpo_is_its_formula(seed: int, start: float) -> None:
    rng = random.Random(seed)
    completions, entropies = drawn(rng, 12)
    rewards = [rng.choice([0.0, 1.0]) for _ in completions]
    advantages = [a for g in (0, 4, 8) for a in oracles.grpo(rewards[g : g + 4], "group", rewards)]
    plugin = GTPO(gamma=0.2)
    plugin.load_state_dict({"start": start})
    found = plugin.advantages(rolled(completions, entropies, 4), judged(rewards), torch.tensor(advantages))
    expected = [
        row
        for g in (slice(0, 4), slice(4, 8), slice(8, 12))
        for row in oracles.gtpo(completions[g], entropies[g], advantages[g], 0.2, start)
    ]
    for row, values in zip(found, expected, strict=True):
        assert row[: len(values)].tolist() == pytest.approx(values, rel=1e-5, abs=1e-6)


def test_gtpo_filters_by_the_entropy_at_the_start_of_training() -> None:
    """The start is the mean over the first training batch's completions that have tokens, and is kept."""
    plugin = GTPO()
    plugin.setup()
    rewards, advantages = judged([1.0, 0.0, 0.0]), torch.tensor([1.0, -0.5, -0.5])
    plugin.advantages(rolled([[], [], []], [[], [], []], 3, length=1), rewards, advantages)
    assert plugin.state_dict()["start"] is None  # all were truncated, and masked
    assert plugin.metrics("train")["filtered_completions"] == 0
    plugin.advantages(rolled([[1, 2], [3], []], [[0.2, 0.4], [0.6], []], 3), rewards, advantages)
    assert plugin.state_dict()["start"] == pytest.approx((0.3 + 0.6) / 2)
    later = rolled([[1, 2], [3], [4]], [[0.8, 0.6], [0.6], [0.9]], 3)
    found = plugin.advantages(later, rewards, advantages)
    assert found[0].tolist() == [0, 0]  # <H> = 0.7 is above ln 2 = 0.693
    assert found[1, 0] == pytest.approx(-0.5 - 0.1 * 0.6)
    assert found[2, 0] == 0
    assert plugin.metrics("train")["filtered_completions"] == pytest.approx((0 + 2 / 3) / 2)
    assert plugin.metrics("train") == {}


@pytest.mark.parametrize("alpha", [0.1, 3.0])
@pytest.mark.parametrize("seed", range(6))
def test_entropy_reward_is_its_formula_whatever_the_constants(seed: int, alpha: float) -> None:
    rng = random.Random(seed)
    completions, entropies = drawn(rng, 12)
    rewards = [rng.choice([0.0, 1.0, 1.0, None]) for _ in completions]
    plugin = EntropyReward()
    found = plugin.advantages(rolled(completions, entropies, 6), judged(rewards), torch.zeros(1))
    right = [None if r is None else r >= 1 for r in rewards]
    groups = (slice(0, 6), slice(6, 12))
    expected = [row for g in groups for row in oracles.entropy_rewards(entropies[g], right[g], alpha)]
    for row, values in zip(found, expected, strict=True):
        # Spreads of a few fp32 numbers; a spread of rounding beside 1e-4 gives at most 1e-3.
        assert row[: len(values)].tolist() == pytest.approx(values, rel=1e-4, abs=2e-3)
        assert row[len(values) :].tolist() == [0] * (len(row) - len(values))


def test_uncertain_tokens_gain_where_right_and_confident_ones_lose_where_wrong() -> None:
    entropies = [[0.1, 2.0], [1.0, 1.0], [0.1, 2.0], [1.0, 1.0]]
    plugin = EntropyReward()
    found = plugin.advantages(rolled([[1, 1]] * 4, entropies, 4), judged([1, 1, 0, 0]), torch.zeros(1))
    assert found[0, 0] < 0 < found[0, 1]
    assert found[2, 0] < 0 < found[2, 1]


@pytest.mark.parametrize("rewards", [[1.0] * 4, [0.0] * 4, [None] * 4])
def test_a_group_of_one_kind_teaches_entropy_reward_nothing(rewards: list[float | None]) -> None:
    completions, entropies = drawn(random.Random(0), 4)
    found = EntropyReward().advantages(rolled(completions, entropies, 4), judged(rewards), torch.zeros(1))
    assert not found.any()


@pytest.mark.parametrize("plugin", [GTPO(), EntropyReward()], ids=["gtpo", "entropy-reward"])
@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2, "loss_type": "sapo"}, {"loss_type": "cispo"}])
def test_both_train_with_every_policy_term(tmp_path: Path, plugin: Any, settings: dict[str, Any]) -> None:
    if settings.get("loss_type") == "cispo":
        settings = {**settings, "epsilon_high": 2.0}
    seen = Seen()
    run = grpo(tmp_path, [plugin, seen], reward=binary_reward, **settings)
    run.train()
    for rollouts, _, advantages in seen.batches:
        assert advantages.shape == rollouts.mask.shape
    assert any(log.get("grad_norm", 0) > 0 for log in run.state.log_history)


def test_gtpo_comes_after_what_sets_advantages_anew(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"set anew after it.* Put .* before "):
        grpo(tmp_path, names=["gtpo", "pkpo:k=2"])
    grpo(tmp_path, names=["pkpo:k=2", "gtpo"])
    with pytest.raises(ConfigurationError, match="Both set advantages anew"):
        grpo(tmp_path, names=["entropy-reward", "gfpo:k=2"])


def test_gtpo_refuses_advantages_per_token(tmp_path: Path) -> None:
    run = grpo(tmp_path, names=["entropy-reward", "gtpo"], reward=binary_reward)
    with pytest.raises(PluginError, match="a plugin before it gives one per token"):
        run.train()
