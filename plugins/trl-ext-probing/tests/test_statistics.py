"""Bounds, quantile curves and routes: against their definitions, exact sums and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom  # type: ignore[import-untyped]
from trl_ext_probing.intervals import clopper_pearson
from trl_ext_probing.reachability.routing import (
    Budget,
    choose_route,
    closing_limit,
    confidence_per_look,
    schedule,
    undecided,
)
from trl_ext_probing.reachability.statistics import (
    BetaPrior,
    fit_prior,
    likelihood_quantile,
)

RATES = np.linspace(0, 1, 201)


@pytest.mark.parametrize("n", [1, 8, 50])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_bounds_cover_at_the_nominal_rate(n: int, confidence: float) -> None:
    """By exact sums over all counts: never less than nominal, and no bound could be tighter on its side."""
    k = np.arange(n + 1)
    low, high = clopper_pearson(k, n, confidence)
    coverage = [float(binom.pmf(k, n, p)[(low <= p) & (p <= high)].sum()) for p in RATES]
    assert min(coverage) >= confidence
    tail = (1 - confidence) / 2
    np.testing.assert_allclose(binom.sf(k[1:] - 1, n, low[1:]), tail, rtol=1e-9)  # P(K >= k) at the lower bound
    np.testing.assert_allclose(binom.cdf(k[:-1], n, high[:-1]), tail, rtol=1e-9)
    assert (low[0], high[-1]) == (0, 1)


def test_bounds_without_trials_say_nothing() -> None:
    assert [float(bound) for bound in clopper_pearson(0, 0)] == [0, 1]


def test_rule_of_three() -> None:
    """After n failures the one-sided 95 % bound is about 3/n."""
    assert float(clopper_pearson(0, 300, 0.9)[1]) * 300 == pytest.approx(3, rel=0.01)


@pytest.mark.parametrize("p", [0.004, 0.03, 0.15, 0.5, 0.9])
def test_bounds_cover_where_rollouts_stop_on_their_account(p: float) -> None:
    """The probe's own loop, simulated 4000 times: the standard error of a coverage of 0.95 is 0.0034."""
    rng = np.random.default_rng(0)
    budget, totals = Budget(8, 2), schedule(8, 128)
    confidence = confidence_per_look(0.95, len(totals))
    covered = 0
    spent = []
    for _ in range(4000):
        k = n = 0
        for total in totals:
            k, n = k + rng.binomial(total - n, p), total
            low, high = (float(bound) for bound in clopper_pearson(k, n, confidence))
            if not undecided(low, high, budget):
                break
        covered += low <= p <= high
        spent.append(n)
    assert covered / 4000 >= 0.95 - 3 * 0.0034
    if p == 0.5:  # well inside a route, which fewer rollouts show
        assert np.mean(spent) < 64


@given(
    st.lists(st.sampled_from([1e-9, 0.01, 0.1, 0.25, 0.5, 1.0]), min_size=1, max_size=12),
    st.integers(0, 24),
)
def test_quantile_is_the_supremum_of_its_definition(likelihoods: list[float], eighths: int) -> None:
    """Q(eps) = sup {alpha <= 1 : P(q <= alpha) <= eps}, by trying values between and at all likelihoods."""
    epsilon = min(eighths / 24, 1.0)
    q = np.array(likelihoods)
    candidates = np.unique(np.concatenate([q, q * (1 - 1e-6), [0.0, 1.0, 0.9999]]))
    allowed = [a for a in candidates if (q <= a).sum() <= epsilon * len(q) + 1e-9]
    got = float(np.exp(likelihood_quantile(np.log(q), epsilon)))
    assert got == pytest.approx(max(allowed), rel=2e-4)  # candidates come this close below the supremum
    assert ((q <= got * (1 - 1e-9)).sum()) <= epsilon * len(q) + 1e-9
    assert got >= 1 - 1e-12 or (q <= got * (1 + 1e-9)).sum() > epsilon * len(q)


def test_quantile_takes_impossible_answers_and_refuses_none() -> None:
    curve = likelihood_quantile([-np.inf, np.log(0.5)], [0.0, 0.5, 1.0])
    assert curve.tolist() == [-np.inf, np.log(0.5), 0.0]
    with pytest.raises(ValueError, match="at least one"):
        likelihood_quantile([], 0.5)


def test_prediction_integrates_over_what_is_not_known() -> None:
    """1 - E[(1-p)^draws] under the posterior, by numerical integration."""
    prior = BetaPrior(0.7, 2.5)
    p = (np.arange(400_000) + 0.5) / 400_000
    density = p ** (0.7 + 1 - 1) * (1 - p) ** (2.5 + 5 - 1)
    expected = ((1 - (1 - p) ** 16) * density).sum() / density.sum()
    assert float(prior.reached(1, 6, 16)) == pytest.approx(expected, rel=1e-4)


def test_informative_groups_are_calibrated_on_other_draws() -> None:
    """8 rollouts of each prompt against the exact mean over rates; c/8 in place of the rate gives too little."""
    rng = np.random.default_rng(3)
    rates = rng.beta(0.5, 1.5, 20_000)
    expected = float((1 - (1 - rates) ** 8 - rates**8).mean())
    successes = rng.binomial(8, rates)
    found = fit_prior(successes, np.full(20_000, 8)).informative_group(successes, 8, 8)
    plugged = (1 - (1 - successes / 8) ** 8 - (successes / 8) ** 8).mean()
    assert found.mean() == pytest.approx(expected, abs=0.01)
    assert plugged < expected - 0.05


def test_informative_group_integrates_over_what_is_not_known() -> None:
    prior = BetaPrior(0.7, 2.5)
    p = (np.arange(400_000) + 0.5) / 400_000
    density = p ** (0.7 + 2 - 1) * (1 - p) ** (2.5 + 4 - 1)
    expected = ((1 - (1 - p) ** 4 - p**4) * density).sum() / density.sum()
    assert float(prior.informative_group(2, 6, 4)) == pytest.approx(expected, rel=1e-4)


def test_predicted_share_is_calibrated_on_other_draws() -> None:
    """Rates from a distribution that is no beta; predicted from 16 rollouts, observed in 24 further ones."""
    rng = np.random.default_rng(1)
    rates = np.where(rng.random(4000) < 0.4, 0.0, rng.beta(0.4, 3.0, 4000))
    successes = rng.binomial(16, rates)
    prior = fit_prior(successes, np.full(4000, 16))
    predicted = prior.reached(successes, 16, 24)
    observed = rng.binomial(24, rates) > 0
    # The standard error of the observed share is 0.008; the beta family misses the point mass at 0 by little.
    assert predicted.mean() == pytest.approx(observed.mean(), abs=0.03)
    for part in np.array_split(np.argsort(predicted), 4):
        assert predicted[part].mean() == pytest.approx(observed[part].mean(), abs=0.08)


def test_prior_of_known_rates_is_found_again() -> None:
    rng = np.random.default_rng(2)
    counts = rng.binomial(20, rng.beta(0.5, 1.5, 20_000))
    a, b = fit_prior(counts, np.full(20_000, 20))
    assert (a, b) == (pytest.approx(0.5, rel=0.05), pytest.approx(1.5, rel=0.05))
    with pytest.raises(ValueError, match="at least one trial"):
        fit_prior([0], [0])


@pytest.mark.parametrize(
    ("p", "low", "high", "worst", "route"),
    [
        (0.95, 0.5, 1.0, None, "saturated"),  # above 1 - 1/8
        (0.5, 0.3, 0.7, None, "in_reach"),  # 0.3 * 16 >= 3
        (0.2, 0.1, 0.4, None, "marginal"),
        (0.0, 0.0, 0.07, None, "marginal"),  # 0.07 * 16 >= 1
        (0.0, 0.0, 0.05, None, "out_of_reach"),
        (0.0, 0.0, 0.05, 0.2, "process_reward"),
        (0.0, 0.0, 0.05, 0.01, "demonstration"),
    ],
)
def test_routes(p: float, low: float, high: float, worst: float | None, route: str) -> None:
    assert choose_route(p, low, high, Budget(8, 2), worst) == route


def test_a_route_is_open_while_a_cut_lies_between_the_bounds() -> None:
    budget = Budget(8, 2)
    assert budget.cuts == (1 / 16, 3 / 16, 7 / 8)
    assert not undecided(0.2, 0.8, budget)
    assert undecided(0.2, 0.9, budget)
    assert undecided(0.1, 0.2, budget)
    assert not undecided(0.0, 0.06, budget)


def test_rounds_double_up_to_the_limit() -> None:
    assert schedule(8, 50) == [8, 16, 32, 50]
    assert schedule(4, 4) == [4]
    for first, limit in ((0, 4), (8, 4)):
        with pytest.raises(ValueError, match="--n "):
            schedule(first, limit)


@pytest.mark.parametrize(
    ("first", "budget"), [(8, Budget(8, 3)), (8, Budget(8, 1)), (4, Budget(16, 10)), (50, Budget(2))]
)
def test_the_limit_is_the_smallest_at_which_failures_decide(first: int, budget: Budget) -> None:
    """By trying every limit, with the probe's own rule for stopping."""

    def decides(limit: int) -> bool:
        totals = schedule(first, limit)
        low, high = clopper_pearson(0, limit, confidence_per_look(0.95, len(totals)))
        return choose_route(0, float(low), float(high), budget) == "out_of_reach"

    found = closing_limit(first, budget, 0.95)
    assert next(limit for limit in range(first, 10_000) if decides(limit)) == found


def test_the_limit_for_three_epochs_of_eight() -> None:
    assert closing_limit(8, Budget(8, 3), 0.95) == 125


def test_budget_refuses_what_grpo_cannot_do() -> None:
    with pytest.raises(ValueError, match="--num-generations 1"):
        Budget(1)
    with pytest.raises(ValueError, match="--epochs 0: above 0"):
        Budget(4, 0.0)
