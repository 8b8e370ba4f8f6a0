"""`pkpo` and `pass-at-k`: against all subsets, and in expectation against the derivative of pass@k on a bandit."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

import policy_oracles as oracles
import pytest
import torch
from policy_runs import Seen, grpo
from trl_ext_policy.pass_at_k import PassAtK, set_advantages
from trl_ext_policy.pkpo import PKPO, marginal_gains

from trl_ext.records import Rewards, Rollouts

SIZES = [(n, k) for n in range(2, 9) for k in range(2, n + 1)]
"""Of groups and sets."""


def group(*rewards: float) -> torch.Tensor:
    return torch.tensor(rewards, dtype=torch.float64)


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_pkpo_is_the_mean_over_all_sets(n: int, k: int) -> None:
    torch.manual_seed(n)
    for rewards in (torch.randn(n).double(), torch.randint(3, (n,)).double(), group(*[0.1] * n)):
        expected = oracles.best_of_sets(rewards.tolist(), k)
        # Sums of at most 70 numbers of size 1 in double precision, with a margin.
        torch.testing.assert_close(marginal_gains(rewards, k), group(*expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_pkpo_of_right_and_wrong_is_its_closed_form(n: int, k: int) -> None:
    for c in range(n + 1):
        found = marginal_gains(group(*[1.0] * c, *[0.0] * (n - c)), k)
        right = k * math.comb(n - c, k - 1) / math.comb(n - 1, k - 1)
        torch.testing.assert_close(found, group(*[right] * c, *[0.0] * (n - c)), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("n", "k"), [(3, 1), (2, 2), (4, 2), (4, 3), (5, 4)])
@pytest.mark.parametrize("rewards", [(1.0, 0.0, 0.0), (0.3, -1.0, 2.0)])
def test_pkpo_estimates_the_gradient_of_the_best_of_k_without_bias(n: int, k: int, rewards: tuple[float, ...]) -> None:
    """A bandit with softmax policy: mean over all draws of 1/n sum_i A_i grad log p, against autograd of E max."""
    logits = torch.tensor([0.3, -0.4, 0.9], dtype=torch.float64, requires_grad=True)
    p = logits.softmax(0)
    best = sum(
        torch.stack([p[arm] for arm in drawn]).prod() * max(rewards[arm] for arm in drawn)
        for drawn in product(range(3), repeat=k)
    )
    (expected,) = torch.autograd.grad(best, logits)
    chances = p.tolist()

    def estimate(drawn: tuple[int, ...]) -> list[float]:
        advantages = marginal_gains(group(*[rewards[arm] for arm in drawn]), k).tolist()
        scores = [[float(arm == a) - chances[a] for a in range(3)] for arm in drawn]
        return [sum(A * s[a] for A, s in zip(advantages, scores, strict=True)) / n for a in range(3)]

    found = oracles.expectation(chances, n, estimate)
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("n", "k"), [*SIZES, (4, 1), (7, 1)])
def test_pass_at_k_is_grpo_on_all_sets(n: int, k: int) -> None:
    for c in range(n + 1):
        right = [i < c for i in range(n)]
        found = set_advantages(torch.tensor(right), k)
        expected = group(*oracles.sets_as_samples(right, k))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_pass_at_k_is_a_shaped_gradient() -> None:
    """In expectation over 8 draws it is the derivative of pass@4 times a factor that grows with the success rate p."""

    def multiple(p: float) -> float:
        expected = 0.0
        for c in range(9):
            right = torch.tensor([i < c for i in range(8)])
            score = torch.where(right, 1 / p, -1 / (1 - p)).double()  # d log p / dp
            chance = math.comb(8, c) * p**c * (1 - p) ** (8 - c)
            expected += chance * float((set_advantages(right, 4) * score).mean())
        return expected / (4 * (1 - p) ** 3)

    factors = [multiple(p) for p in (0.01, 0.1, 0.3, 0.5, 0.8)]
    assert factors == sorted(factors)
    assert [factors[0], factors[-1]] == pytest.approx([0.252, 0.757], abs=1e-3)  # what the documents say


def advantages(plugin: Any, rewards: list[list[float | None]], size: int, rows: slice | None = None) -> list[float]:
    """Through the hook: groups of `size`, one list of rewards per completion."""
    values = torch.tensor([[torch.nan if r is None else r for r in row] for row in rewards])
    n = len(rewards)
    record = Rewards(values, tuple("ab"[: values.shape[1]]), torch.ones(values.shape[1]), rows or slice(0, n))
    ids = torch.zeros(n, 1, dtype=torch.long)
    rollouts = Rollouts([], [], [], ids, ids, ids, ids + 1, size, 0, True)
    return plugin.advantages(rollouts, record, torch.zeros(1)).tolist()


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("method", [PKPO, PassAtK])
def test_what_no_function_judged_is_not_in_its_group(method: Any, k: int) -> None:
    judged, plugin = [0.5, 1.0, 0.0], method(k=k)
    right = [reward >= 1 for reward in judged]
    expected = oracles.best_of_sets(judged, k) if method is PKPO else oracles.sets_as_samples(right, k)
    found = advantages(plugin, [[0.5], [None], [1.0], [0.0]], 4)
    assert found == pytest.approx([expected[0], 0.0, expected[1], expected[2]], abs=1e-6)
    assert any(found) or (method, k) == (PassAtK, 3)  # its one set has no spread
    assert advantages(plugin, [[1.0], [None], [None], [None]], 4) == [0, 0, 0, 0]
    assert advantages(plugin, [[None]] * 4, 4) == [0, 0, 0, 0]


@pytest.mark.parametrize("plugin", [PKPO(k=2), PassAtK(k=2)], ids=["pkpo", "pass-at-k"])
def test_a_rank_gets_its_rows_of_groups_that_reach_over_ranks(plugin: Any) -> None:
    rewards: list[list[float | None]] = [[1.0], [0.0], [0.0], [0.0], [1.0], [1.0]]
    whole = advantages(plugin, rewards, 3)
    assert advantages(plugin, rewards, 3, slice(2, 4)) == whole[2:4]
    assert whole[:3] == pytest.approx(advantages(plugin, rewards[:3], 3))
    assert any(whole)


def test_several_functions_add_up() -> None:
    found = advantages(PKPO(k=2), [[0.5, 0.5], [0.0, None], [None, 0.25]], 3)
    assert found == pytest.approx(oracles.best_of_sets([1.0, 0.0, 0.25], 2))


@pytest.mark.parametrize("plugin", [PKPO(k=3), PassAtK(k=3)], ids=["pkpo", "pass-at-k"])
def test_equal_rewards_teach_nothing(plugin: Any) -> None:
    for reward in (0.0, 1.0, 0.1):
        assert advantages(plugin, [[reward]] * 5, 5) == [0] * 5


def test_k_follows_its_schedule(tmp_path: Path) -> None:
    """From 4 to 1 in the first three of four steps: 4, 3, 2, 1."""
    seen = Seen()
    grpo(tmp_path, [seen], names=["pkpo:k=linear:4:1:0.75"], max_steps=4).train()
    for k, (_, rewards, found) in zip((4, 3, 2, 1), seen.batches, strict=True):
        for group, advantages in zip(rewards.total.view(-1, 4).tolist(), found.view(-1, 4).tolist(), strict=True):
            mean = sum(group) / 4
            expected = oracles.best_of_sets(group, k) if k > 1 else [(r - mean) * 4 / 3 for r in group]
            assert advantages == pytest.approx(expected, abs=1e-5)  # TRL's rewards are in fp32
