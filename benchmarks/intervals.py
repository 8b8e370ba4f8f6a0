"""How often the intervals of `trl-ext probe passk` hold the truth, by simulation.

    python benchmarks/intervals.py [--repeats 4000]

Problems are drawn from populations of pass rates, and 8 samples of each; intervals are those of pass@k at 90 %, and of
the difference between two models on the same problems. A share of 4,000 repeats is known to within 1 point.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from trl_ext_probing.intervals import mean_difference, mean_with_interval
from trl_ext_probing.passk.estimator import pass_at_k
from trl_ext_probing.tables import table

Rates = NDArray[np.float64]
SAMPLES, LEVEL, KS, PROBLEMS = 8, 0.9, (1, 4), (10, 20, 60, 200)
POPULATIONS: dict[str, Callable[[np.random.Generator, int], Rates]] = {
    "0.3 throughout": lambda rng, n: np.full(n, 0.3),
    "uniform": lambda rng, n: rng.random(n),
    "0.9 of 60 %, else 0": lambda rng, n: 0.9 * (rng.random(n) < 0.6),
    "Beta(0.3, 3), most near 0": lambda rng, n: rng.beta(0.3, 3.0, n),
    "Beta(3, 0.3), most near 1": lambda rng, n: rng.beta(3.0, 0.3, n),
}
COUPLES: dict[str, Callable[[np.random.Generator, int], Rates]] = {
    "uniform; half of the rest learnt": lambda rng, n: np.stack([p := rng.random(n), p + (1 - p) / 2]),
    "uniform; the same": lambda rng, n: np.stack([p := rng.random(n), p]),
    "uniform; another": lambda rng, n: rng.random((2, n)),
    "0.2; 0.9 of 30 %": lambda rng, n: np.stack([np.full(n, 0.2), np.where(rng.random(n) < 0.3, 0.9, 0.2)]),
}


def estimates(rng: np.random.Generator, rates: Rates, k: int) -> Rates:
    """pass@k of each problem, from samples of it; the same shape as the rates."""
    values = np.array([pass_at_k(SAMPLES, c, k) for c in range(SAMPLES + 1)])
    return values[rng.binomial(SAMPLES, rates)]


def coverage(draw: Callable[[np.random.Generator, int], Rates], k: int, problems: int, repeats: int) -> str:
    """Percent of the intervals that hold the mean over the population, or the mean difference over the couples."""
    rng = np.random.default_rng(0)
    means = (1 - (1 - draw(rng, 1_000_000)) ** k).mean(-1)
    truth = means[1] - means[0] if means.shape else means
    held = 0
    for _ in range(repeats):
        found = estimates(rng, draw(rng, problems), k).tolist()
        estimate = mean_difference(*found, LEVEL) if means.shape else mean_with_interval(found, LEVEL)
        _, low, high = estimate.bounds
        held += low <= truth <= high
    return f"{held / repeats:.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=4000)
    repeats = parser.parse_args().repeats
    head = ["pass rates", "estimate", *(f"{problems} problems" for problems in PROBLEMS)]
    for title, cases in (("one model", POPULATIONS), ("the second model minus the first", COUPLES)):
        rows = (
            [name, f"pass@{k}", *(coverage(draw, k, problems, repeats) for problems in PROBLEMS)]
            for name, draw in cases.items()
            for k in KS
        )
        print(f"{title}, intervals of {LEVEL:.0%}\n\n{table(head, rows)}", flush=True)


if __name__ == "__main__":
    main()
