"""pass@k without bias, and an interval for its mean over problems."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that k of n samples, drawn without replacement, hold one of c correct ones.

    Unbiased for the chance that k fresh samples do (arXiv:2107.03374, section 2.1).

    Raises:
        ValueError: not 1 <= k <= n or not 0 <= c <= n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k={k} is not in [1, n={n}]: draw at least k samples per problem")
    if not 0 <= c <= n:
        raise ValueError(f"c={c} is not in [0, n={n}]")
    missed = 1.0
    for i in range(k):  # C(n - c, k) / C(n, k), factor by factor; 0 as soon as k > n - c
        missed *= max(n - c - i, 0) / (n - i)
    return 1.0 - missed


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its confidence interval."""

    mean: float
    low: float
    high: float
    problems: int


def mean_with_interval(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean of values in [0, 1], one per independently drawn problem, with a Wilson score interval.

    Problems are the independent units: the spread of their estimates holds both how problems differ and the noise of n
    samples each. The interval is Wilson's for a share p at the effective number of problems P p (1 - p) / s^2, with s^2
    the sample variance of the values: with values of 0 and 1 it is Wilson's own, and unlike mean +- z s / sqrt(P) it
    stays in [0, 1] and does not shrink to a point when all problems come out alike.

    Raises:
        ValueError: no values, or a confidence outside (0, 1).
    """
    if not values:
        raise ValueError("no problem to average over")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} is not in (0, 1)")
    count = len(values)
    p = math.fsum(values) / count
    variance = math.fsum((v - p) ** 2 for v in values) / max(count - 1, 1)
    effective = count * p * (1 - p) / variance if variance > 0 else count
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    square = z * z / effective
    centre = (p + square / 2) / (1 + square)
    half = math.sqrt(square * (p * (1 - p) + square / 4)) / (1 + square)
    return Estimate(p, max(centre - half, 0.0), min(centre + half, 1.0), count)
