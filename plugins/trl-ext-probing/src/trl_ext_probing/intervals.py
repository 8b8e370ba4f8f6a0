"""Estimates with confidence intervals: means and shares over problems, ratios over examples, differences over seeds."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincinv, nctdtr, stdtrit  # type: ignore[import-untyped]

Floats = NDArray[np.float64]

_NO_VARIANCE = 1e-12
"""Below it the values are alike, and what is left is rounding: of 1/3 met ten times, say."""

_MOST_SEEDS = 10_000


@dataclass(frozen=True)
class Estimate:
    """A number with its confidence interval; all three are None where it is undefined."""

    value: float | None
    low: float | None
    high: float | None
    count: int
    """Independent units that it is over: problems, examples or seeds."""
    reason: str = ""
    """Why it is undefined."""

    @property
    def bounds(self) -> tuple[float, float, float]:
        """Value, low and high of an estimate that is defined."""
        assert self.value is not None
        assert self.low is not None
        assert self.high is not None
        return self.value, self.low, self.high


def student_t(confidence: float, degrees: int) -> float:
    """Half-width of the central interval of Student's t distribution that holds `confidence` of it.

    Raises:
        ValueError: a confidence outside (0, 1).
    """
    _check_confidence(confidence)
    return float(stdtrit(degrees, (1 + confidence) / 2))


def clopper_pearson(successes: ArrayLike, trials: ArrayLike, confidence: float = 0.95) -> tuple[Floats, Floats]:
    """Exact two-sided bounds of a success rate: they cover it with at least the given probability, whatever it is.

    Args:
        successes, trials: whole numbers, of any one shape; without trials the bounds are 0 and 1.
        confidence: in (0, 1); half of the rest on each side.
    """
    k, n = np.asarray(successes, dtype=float), np.asarray(trials, dtype=float)
    tail = (1 - confidence) / 2
    # The beta distribution has no parameter 0, and its limits there are the bounds 0 and 1.
    low = np.where(k > 0, betaincinv(np.maximum(k, 1), n - k + 1, tail), 0.0)
    high = np.where(k < n, betaincinv(k + 1, np.maximum(n - k, 1), 1 - tail), 1.0)
    return low, high


def mean_with_interval(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean of values in [0, 1], one per independently drawn problem, with a score interval.

    Problems are the independent units: the spread of their estimates holds both how problems differ and the noise of n
    samples each. The interval is Wilson's for a share p at the effective number of problems P p (1 - p) / s^2, with s^2
    the sample variance of the values and the quantile of Student's t with P - 1 degrees of freedom, since s^2 is itself
    estimated. Unlike mean +- t s / sqrt(P) it stays in [0, 1] and does not shrink to a point when all problems come out
    alike: it is then Wilson's at P problems. Of one problem it is [0, 1].

    Where it falls short: populations in which nearly all problems are alike and a few are far off, because a sample
    then seldom shows how much they differ. Measured with 8 samples a problem, at 90 % (`benchmarks/intervals.py`): with
    10 problems, pass@1 of pass rates from Beta(0.3, 3), most of them near 0, is covered in 85 % of the cases, and from
    Beta(3, 0.3) in 86 %; with 20 and 60 problems both in 87 to 90 %. pass@4 of the latter is 0.994 and covered in 70 %
    with 20 problems, 63 % with 60 and 78 % with 200 (94 % with 10). An interval of a pass@k near 0 or 1 that is much
    narrower than 1 / P is no evidence.

    Raises:
        ValueError: no values, or a confidence outside (0, 1).
    """
    _check_confidence(confidence)
    if not values:
        raise ValueError("no problem to average over")
    count = len(values)
    p = min(max(math.fsum(values) / count, 0.0), 1.0)
    if count == 1:
        return Estimate(p, 0.0, 1.0, 1)
    variance = math.fsum((v - p) ** 2 for v in values) / (count - 1)
    effective = count if variance < _NO_VARIANCE else count * p * (1 - p) / variance
    square = student_t(confidence, count - 1) ** 2 / effective
    centre = (p + square / 2) / (1 + square)
    half = math.sqrt(square * (p * (1 - p) + square / 4)) / (1 + square)
    # Rounding may otherwise put the mean outside where it is 0 or 1.
    return Estimate(p, min(max(centre - half, 0.0), p), max(min(centre + half, 1.0), p), count)


def mean_difference(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean of second - first, values in [0, 1] of the same problems in the same order, with its interval.

    Newcombe's tenth method for paired shares (Statistics in Medicine 17, 1998, 2635-2650) on the intervals of
    `mean_with_interval`: on each side it joins their half-widths a and b to sqrt(a^2 + b^2 - 2 r a b), with r the
    correlation of the two over the problems. It is near mean +- t s / sqrt(P) of the differences, stays in [-1, 1] and,
    where both solve all problems, keeps the doubt about each. Values that are the same throughout may give a point,
    which is no evidence. It falls short where `mean_with_interval` does, and somewhat with 10 problems: two models with
    uniform pass rates, pass@4 of 8 samples, 83 to 84 % at a level of 90 % (20 problems: 88, 60: 90 to 91).

    Raises:
        ValueError: no problems, another number of them, or a confidence outside (0, 1).
    """
    pairs = list(zip(first, second, strict=True))
    (a, a_low, a_high), (b, b_low, b_high) = (mean_with_interval(v, confidence).bounds for v in (first, second))
    squares = [math.fsum((v - mean) ** 2 for v in values) for values, mean in ((first, a), (second, b))]
    product = math.fsum((x - a) * (y - b) for x, y in pairs)
    r = product / math.sqrt(squares[0] * squares[1]) if min(squares) > _NO_VARIANCE else 0.0

    def joined(x: float, y: float) -> float:
        return math.sqrt(max(x * x + y * y - 2 * r * x * y, 0.0))

    mean = b - a
    low = mean - joined(b - b_low, a_high - a)
    high = mean + joined(b_high - b, a - a_low)
    return Estimate(mean, max(low, -1.0), min(high, 1.0), len(pairs))


def ratio_with_interval(sums: ArrayLike, sizes: ArrayLike, confidence: float = 0.95) -> Estimate:
    """sum(x) / sum(t), a mean per token, with its interval over the N examples: +- q s / sqrt(N) / m.

    Tokens of one example go together, so the interval is that of a ratio over examples: s is the standard deviation of
    x_i - ratio t_i, m the mean of t, and q the quantile of Student's distribution with N - 1 degrees of freedom. The
    change between two models on the same tokens is the ratio of the differences of their sums.

    An interval of width zero is no evidence: it says that the examples at hand are all alike (the accuracy of every
    one changed by nothing, say), and not how far others may be.

    Args:
        sums: (n,) x of each example.
        sizes: (n,) t, its tokens; an example without any does not count.

    Raises:
        ValueError: fewer than two examples count, or a confidence outside (0, 1).
    """
    t = np.asarray(sizes, dtype=float)
    x, t = np.asarray(sums, dtype=float)[t > 0], t[t > 0]
    if len(t) < 2:
        raise ValueError(f"an interval needs at least two examples with a token to score, and there are {len(t)}")
    ratio = math.fsum(x) / math.fsum(t)
    deviation = math.sqrt(math.fsum((x - ratio * t) ** 2) / (len(t) - 1))
    half = student_t(confidence, len(t) - 1) * deviation * math.sqrt(len(t)) / math.fsum(t)
    return Estimate(ratio, ratio - half, ratio + half, len(t))


def share(control: Sequence[float], pretrained: Sequence[float], floor: float, confidence: float = 0.95) -> Estimate:
    """S = (control - floor) / (pretrained - floor) of the means over seeds, with Fieller's interval.

    Numerator and denominator are means over the same seeds, so their covariance counts: the interval holds the values s
    at which a paired t-test does not reject mean(control - floor) = s mean(pretrained - floor) (Fieller, J. R. Stat.
    Soc. B 16, 1954). For normally distributed scores this set covers S with exactly the given probability. Where the
    denominator is not above 0 by the same test, it has no finite bounds, and S is undefined.

    Args:
        control: (seeds,) scores from random weights.
        pretrained: (seeds,) scores from pre-trained weights, of the same seeds in the same order.
        floor: score without any knowledge of the task; taken as known.
        confidence: of the interval, in (0, 1).

    Raises:
        ValueError: fewer than two seeds, or not as many of both.
    """
    x, y = _paired(control, pretrained)
    x, y = x - floor, y - floor
    n = len(x)
    quantile = student_t(confidence, n - 1) ** 2 / n
    (xx, xy), (_, yy) = np.cov(x, y)
    a = y.mean() ** 2 - quantile * yy
    if not (y.mean() > 1e-12 and a > 1e-12 * y.mean() ** 2):  # rounding: equal scores have no spread
        return Estimate(
            None, None, None, n, "the pre-trained model is not above the floor beyond the spread of its seeds"
        )
    b = x.mean() * y.mean() - quantile * xy
    c = x.mean() ** 2 - quantile * xx
    root = math.sqrt(max(b * b - a * c, 0.0))
    return Estimate(float(x.mean() / y.mean()), float((b - root) / a), float((b + root) / a), n)


def seed_mean(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean over seeds, with the t interval; of one seed, or where a value is not finite, it has no interval.

    Raises:
        ValueError: No seeds, or a confidence outside (0, 1).
    """
    x = np.asarray(values, dtype=float)
    if not x.size:
        raise ValueError("no seed to average over")
    if not np.isfinite(x).all():
        return Estimate(None, None, None, len(x), "a run diverged")
    if x.size == 1:
        return Estimate(float(x[0]), None, None, 1, "one seed tells nothing of others")
    half = student_t(confidence, len(x) - 1) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return Estimate(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half, len(x))


def seeds_needed(differences: Sequence[float], confidence: float = 0.95, power: float = 0.8) -> int | None:
    """Seeds at which a paired t-test would find a difference as large as the one at hand, with this probability.

    The differences of n seeds are taken as normal, with the mean and standard deviation of those at hand; the smallest
    n is given at which the test at level 1 - confidence rejects 0 in the direction of the mean with the power asked
    for, by the noncentral t distribution. The estimate is as rough as the standard deviation of so few seeds: of three
    its 95 % interval reaches from 0.5 to 6.3 times the value.

    Returns:
        At least 2; None where it would take more than 10,000, where the mean is 0, or with fewer than two differences.

    Raises:
        ValueError: A confidence or power outside (0, 1).
    """
    _check_confidence(confidence)
    _check_confidence(power)
    d = np.asarray(differences, dtype=float)
    if d.size < 2 or not np.isfinite(d).all() or d.mean() == 0:
        return None
    spread = float(d.std(ddof=1))
    if spread < _NO_VARIANCE * abs(d.mean()):
        return 2
    effect = abs(float(d.mean())) / spread

    def enough(n: int) -> bool:
        reached = 1 - nctdtr(n - 1, effect * math.sqrt(n), student_t(confidence, n - 1))
        # Far in the tail, where nothing is missed, it has no value.
        return bool(reached >= power) or bool(np.isnan(reached))

    if not enough(_MOST_SEEDS):
        return None
    return bisect_left(range(_MOST_SEEDS), True, lo=2, key=enough)


def seed_difference(control: Sequence[float], pretrained: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean of control - pretrained over seeds, with the paired t interval; arguments as for `share`."""
    x, y = _paired(control, pretrained)
    return seed_mean(list(x - y), confidence)


def _paired(control: Sequence[float], pretrained: Sequence[float]) -> tuple[Floats, Floats]:
    x, y = np.asarray(control, dtype=float), np.asarray(pretrained, dtype=float)
    if x.shape != y.shape or x.size < 2:
        raise ValueError(f"an interval over seeds needs two or more of both arms, not {x.size} and {y.size}")
    return x, y


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} is not in (0, 1)")
