"""Draws until success in `examples/reachability_queries.py`: against a loop, and the geometric distribution."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def queries(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "examples"))
    return importlib.import_module("reachability_queries")


@pytest.mark.parametrize("at_once", [1, 3, 8, 50])
def test_first_success_is_where_a_loop_finds_it(queries: Any, at_once: int) -> None:
    outcomes = np.random.default_rng(0).random((30, 20)) < np.linspace(0, 0.5, 30)[:, None]
    asked = np.zeros(30, dtype=int)

    def draw(prompts: list[int]) -> list[bool]:
        hits = []
        for i in prompts:
            hits.append(bool(outcomes[i, asked[i]]))
            asked[i] += 1
        return hits

    got = queries.draws_until_solved(draw, 30, 20, at_once)
    expected = [next((i + 1 for i, hit in enumerate(row) if hit), 0) for row in outcomes]
    assert got.tolist() == expected
    assert 0 in expected  # never solved
    assert max(asked) == 20


def test_ratio_of_geometric_draws_is_one(queries: Any) -> None:
    """Rates from 1 to 1/3000, at most 500 draws: the intervals hold 1, and the limit is allowed for."""
    rng = np.random.default_rng(1)
    alphas = np.repeat(10.0 ** -np.arange(0, 3.6, 0.25), 400)
    draws = rng.geometric(alphas)
    bins = queries.query_ratios(alphas, np.where(draws > 500, 0, draws), 500)
    assert sum(b["prompts"] for b in bins) == len(alphas)
    assert all(b["interval"][0] - 0.02 <= 1 <= b["interval"][1] + 0.02 for b in bins)
    rare = bins[-1]
    assert rare["mean_draws"] < 500 < 1 / alphas[-1]
    assert rare["unsolved"] == sum((draws > 500) & (1 / alphas >= rare["from"]))
    doubled = queries.query_ratios(alphas, 2 * draws, 10_000)
    assert all(b["ratio"] > 1.5 for b in doubled)


def test_ratio_by_hand(queries: Any) -> None:
    (bin_,) = queries.query_ratios([0.5, 0.5, 0.4], [1, 3, 0], 4)
    expected = (2 * (1 - 0.5**4) / 0.5 + (1 - 0.6**4) / 0.4) / 3
    assert bin_["expected"] == pytest.approx(expected)
    assert bin_["ratio"] == pytest.approx(8 / 3 / expected)
    assert (bin_["unsolved"], bin_["mean_draws"]) == (1, pytest.approx(8 / 3))
