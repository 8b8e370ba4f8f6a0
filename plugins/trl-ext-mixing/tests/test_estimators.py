"""pass@k against the closed form and enumeration; its interval against simulated problems."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest
from trl_ext_mixing.estimators import mean_with_interval, pass_at_k


def test_closed_form_for_every_small_case() -> None:
    for n in range(1, 13):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            assert pass_at_k(n, c, k) == pytest.approx(1 - math.comb(n - c, k) / math.comb(n, k), abs=1e-12)


def test_enumeration_of_all_subsets() -> None:
    for n, c, k in ((6, 2, 3), (7, 1, 4), (5, 5, 2), (8, 3, 6)):
        solved = [True] * c + [False] * (n - c)
        subsets = list(itertools.combinations(solved, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_it_is_unbiased_for_k_fresh_samples() -> None:
    p, n = 0.13, 10
    for k in (1, 4, 10):
        mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
        assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_large_n_does_not_overflow() -> None:
    assert pass_at_k(2048, 1, 1024) == pytest.approx(0.5)


@pytest.mark.parametrize("arguments", [(4, 1, 5), (4, 5, 1), (4, -1, 1), (4, 1, 0)])
def test_impossible_counts_are_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"is not in \["):
        pass_at_k(*arguments)


def test_of_zeros_and_ones_it_is_wilsons_interval() -> None:
    """Wilson (1927) for 8 of 10 at 95 %: 0.4902 to 0.9433, up to the sample variance's P - 1."""
    estimate = mean_with_interval([1.0] * 80 + [0.0] * 20)
    z, p, n = 1.959964, 0.8, 99  # effective: P p (1 - p) / s^2 = P - 1
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert estimate.low == pytest.approx((centre - half) / (1 + z * z / n), abs=1e-6)
    assert estimate.high == pytest.approx((centre + half) / (1 + z * z / n), abs=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_problems_that_all_come_out_alike_leave_doubt(value: float) -> None:
    estimate = mean_with_interval([value] * 50)
    assert estimate.mean == value
    assert 0.05 < estimate.high - estimate.low < 0.1  # z^2 / (P + z^2)
    assert 0 <= estimate.low <= estimate.high <= 1


# How solvable a problem is: chance of one sample, drawn per problem.
POPULATIONS: dict[str, Callable[[random.Random], float]] = {
    "alike": lambda rng: 0.3,
    "spread": lambda rng: rng.random(),
    "easy or hopeless": lambda rng: 0.9 if rng.random() < 0.6 else 0.0,
    "mostly hard": lambda rng: rng.betavariate(0.3, 3.0),
}


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("population", POPULATIONS)
def test_the_interval_covers_at_its_level(population: str, k: int) -> None:
    draw, n, problems, repeats = POPULATIONS[population], 8, 60, 1500
    rng = random.Random(0)
    truth = sum(1 - (1 - draw(rng)) ** k for _ in range(200_000)) / 200_000
    covered = 0
    for _ in range(repeats):
        values = []
        for _ in range(problems):
            p = draw(rng)
            values.append(pass_at_k(n, sum(rng.random() < p for _ in range(n)), k))
        estimate = mean_with_interval(values, 0.9)
        covered += estimate.low <= truth <= estimate.high
    # 1500 repeats have a standard error of 0.8 points at 90 %; four of them either way.
    assert 0.868 < covered / repeats < 0.935, covered / repeats


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="no problem"):
        mean_with_interval([])
    with pytest.raises(ValueError, match="confidence=1"):
        mean_with_interval([0.5], 1)
