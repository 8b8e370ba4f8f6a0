"""`clip-cov`, `kl-cov` and `entropy-advantage`: against loops over tokens, and against TRL where nothing is chosen."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from policy_runs import grpo
from trl_ext_policy.clip_cov import ClipCov
from trl_ext_policy.covariance import covariances, highest
from trl_ext_policy.entropy_advantage import EntropyAdvantage
from trl_ext_policy.kl_cov import KLCov
from trl_ext_policy.surrogate import Clipped

from trl_ext.records import PolicyTokens
from trl_ext.testing.runs import moved, parameters


def tokens(seed: int = 0, training: bool = True, rows: int = 4, length: int = 12) -> PolicyTokens:
    torch.manual_seed(seed)
    old = -3 * torch.rand(rows, length, dtype=torch.float64)
    return PolicyTokens(
        log_probs=(old + 0.3 * torch.randn(rows, length).double()).requires_grad_(),
        old_log_probs=old,
        advantages=2 * torch.randn(rows, 1, dtype=torch.float64).expand(rows, length),
        mask=torch.arange(length) < torch.randint(1, length + 1, (rows, 1)),
        entropy=3 * torch.rand(rows, length, dtype=torch.float64),
        training=training,
        progress=0.0,
    )


def listed(record: PolicyTokens) -> list[tuple[int, int, float, float, float]]:
    """Row, place, log-probability, ratio and advantage of each token that counts."""
    return [
        (i, t, float(lp), math.exp(float(lp - record.old_log_probs[i, t])), float(record.advantages[i, t]))
        for i, row in enumerate(record.log_probs.detach())
        for t, lp in enumerate(row)
        if record.mask[i, t]
    ]


def covariance_by_hand(record: PolicyTokens) -> dict[tuple[int, int], float]:
    entries = listed(record)
    lp, advantage = (statistics.fmean(e[column] for e in entries) for column in (2, 4))
    return {(i, t): (p - lp) * (a - advantage) for i, t, p, _, a in entries}


def clipped_by_hand(ratio: float, advantage: float, low: float, high: float, delta: float | None = None) -> float:
    bounded = ratio if delta is None else min(ratio, delta)
    return -min(bounded * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


@pytest.mark.parametrize("seed", range(4))
def test_covariances_are_over_the_tokens_that_count(seed: int) -> None:
    record = tokens(seed)
    found = covariances(record)
    for (i, t), expected in covariance_by_hand(record).items():
        assert float(found[i, t]) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert not found.requires_grad


@pytest.mark.parametrize(("share", "count"), [(0.001, 1), (0.1, 2), (0.5, 10), (1.0, 12)])
def test_the_highest_are_counted_on_all_tokens_and_taken_among_some(share: float, count: int) -> None:
    torch.manual_seed(0)
    scores, of = torch.randn(4, 5), torch.ones(4, 5, dtype=torch.bool)
    among = torch.zeros(20, dtype=torch.bool)
    among[torch.randperm(20)[:12]] = True
    marked = highest(scores, among.view(4, 5), share, of).flatten()
    best = sorted((float(s), i) for i, s in enumerate(scores.flatten()) if among[i])[-count:]
    assert set(marked.nonzero().flatten().tolist()) == {i for _, i in best}


def test_no_token_is_marked_where_there_is_none() -> None:
    empty = torch.zeros(2, 3, dtype=torch.bool)
    assert not highest(torch.rand(2, 3), empty, 0.5, empty).any()


@pytest.mark.parametrize("seed", range(4))
def test_kl_cov_penalizes_the_tokens_of_the_highest_covariance(seed: int) -> None:
    record = tokens(seed)
    plugin = KLCov(share=0.2, beta=0.7)
    loss = plugin.policy_loss(record).detach()
    covariance = covariance_by_hand(record)
    count = max(1, int(0.2 * len(covariance)))
    chosen = sorted(covariance, key=lambda place: covariance[place])[-count:]
    for i, t, _, ratio, advantage in listed(record):
        penalty = 0.7 * abs(math.log(ratio)) if (i, t) in chosen else 0.0
        assert float(loss[i, t]) == pytest.approx(-ratio * advantage + penalty, rel=1e-9)
    assert plugin.metrics("train") == pytest.approx({"chosen": count / len(covariance)})
    assert plugin.metrics("train") == plugin.metrics("eval") == {}


@pytest.mark.parametrize("seed", range(6))
def test_clip_cov_drops_some_tokens_of_the_band(seed: int) -> None:
    """As many as the share says, at random, none that the ratio clips already; their gradient is exactly 0."""
    record = tokens(seed)
    plugin = ClipCov(share=0.1, low=0.2, high=2.0)
    loss = plugin.policy_loss(record)
    (gradient,) = torch.autograd.grad(loss[record.mask].sum(), record.log_probs)
    covariance = covariance_by_hand(record)
    band, dropped = [], []
    for i, t, _, ratio, advantage in listed(record):
        expected = clipped_by_hand(ratio, advantage, 0.2, 0.2)
        unclipped = expected == -ratio * advantage
        if unclipped and 0.2 < covariance[i, t] < 2.0:
            band.append((i, t))
        if (i, t) in band and float(loss[i, t]) == 0:
            dropped.append((i, t))
            assert float(gradient[i, t]) == 0
        else:
            assert float(loss[i, t]) == pytest.approx(expected, rel=1e-9)
            assert (float(gradient[i, t]) != 0) == unclipped
    assert len(dropped) == min(len(band), max(1, int(0.1 * len(covariance))))


@pytest.mark.parametrize("delta", [1.3, 1.1])
def test_clip_cov_leaves_tokens_alone_that_delta_bounds(delta: float) -> None:
    """They have no gradient already; here all others may be drawn. Below 1 + high, delta bounds gains too."""
    record = tokens(0)
    plugin = ClipCov(share=1.0, low=-9.0, high=9.0)
    plugin._clipped = Clipped(delta=delta)
    loss = plugin.policy_loss(record)
    bounded = set()
    for i, t, _, ratio, advantage in listed(record):
        expected = clipped_by_hand(ratio, advantage, 0.2, 0.2, delta=delta)
        free = expected == -ratio * advantage
        assert float(loss[i, t].detach()) == pytest.approx(0 if free else expected, rel=1e-9)
        if not free and delta < ratio:
            bounded.add(advantage > 0)
    assert bounded == {True, False}


def test_clip_cov_draws_anew_each_time() -> None:
    record = tokens(2)
    plugin = ClipCov(share=0.02, low=-9.0, high=9.0)
    drawn = {int((plugin.policy_loss(record) == 0).flatten().nonzero()[0]) for _ in range(30)}
    assert len(drawn) > 5


def test_evaluation_chooses_no_token_and_draws_no_number() -> None:
    record = tokens(training=False)
    state = torch.get_rng_state()
    for plugin in (ClipCov(share=1.0, low=-9.0, high=9.0), KLCov(share=1.0, beta=5.0)):
        loss = plugin.policy_loss(record)
        assert (loss[record.mask] != 0).all()
        assert plugin.metrics("train") == {}
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("delta", [None, 1.5])
def test_entropy_adds_to_the_advantage_up_to_a_share_of_it(delta: float | None) -> None:
    record = tokens(1)
    plugin = EntropyAdvantage(alpha=0.3, kappa=3.0)
    plugin._clipped = Clipped(0.1, 0.3, delta)
    loss = plugin.policy_loss(record)
    limited = 0
    for i, t, _, ratio, advantage in listed(record):
        bonus = min(0.3 * float(record.entropy[i, t]), abs(advantage) / 3)
        limited += bonus < 0.3 * float(record.entropy[i, t])
        expected = clipped_by_hand(ratio, advantage + bonus, 0.1, 0.3, delta)
        assert float(loss[i, t]) == pytest.approx(expected, rel=1e-9)
    assert 0 < limited < len(listed(record))


NOTHING_CHANGED = {
    "entropy-advantage": lambda: EntropyAdvantage(alpha=0.0),
    "clip-cov": lambda: ClipCov(low=1e6, high=2e6),
}


@pytest.mark.parametrize("name", NOTHING_CHANGED)
@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "dapo", "epsilon": 0.01, "epsilon_high": 0.03},
        {"loss_type": "grpo", "delta": 1.01, "epsilon": 0.005},
        {"loss_type": "bnpo", "beta": 0.1, "mask_truncated_completions": True},
        {"loss_type": "dr_grpo", "entropy_coef": 0.1, "epsilon": 0.01},
        {"loss_type": "luspo", "top_entropy_quantile": 0.5, "epsilon": 0.01},
    ],
    ids=lambda settings: settings["loss_type"],
)
def test_where_nothing_is_changed_it_is_trl(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    """The first rollouts used twice at a high rate, so that ratios leave the clipping range.

    Further rollouts would differ, since clip-cov draws random numbers too.
    """
    runs = []
    for i, plugins in enumerate(([], [NOTHING_CHANGED[name]()])):
        trainer = grpo(tmp_path / str(i), plugins, num_iterations=2, max_steps=2, **settings)
        start = parameters(trainer)
        trainer.train()
        runs.append(parameters(trainer))
        assert moved(trainer, start) > 1e-3
        logs = trainer.state.log_history
        if not plugins:
            assert sum(log.get("clip_ratio/region_mean", 0) for log in logs) > 0
    clip = [log[key] for log in logs for key in log if "clip_ratio/region" in key]
    assert not clip  # TRL's own numbers are of a term that is not used
    largest = max(float((runs[0][key] - runs[1][key]).abs().max()) for key in runs[0])
    # Weights of size 1 after 2 steps of SGD at 0.2 in fp32: rounding of 1e-7 in two orders of summation.
    assert largest < 5e-6
