"""The share S that a run from random weights reaches, and its interval over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student  # type: ignore[import-untyped]


class Interval(NamedTuple):
    """An estimate over seeds with its bounds; all of them None where it is undefined."""

    value: float | None
    low: float | None
    high: float | None
    reason: str = ""
    """Why it is undefined."""


def share(control: Sequence[float], pretrained: Sequence[float], floor: float, confidence: float = 0.95) -> Interval:
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
    quantile = student.ppf((1 + confidence) / 2, n - 1) ** 2 / n
    (xx, xy), (_, yy) = np.cov(x, y)
    a = y.mean() ** 2 - quantile * yy
    if not (y.mean() > 1e-12 and a > 1e-12 * y.mean() ** 2):  # rounding: equal scores have no spread
        return Interval(None, None, None, "the pre-trained model is not above the floor beyond the spread of its seeds")
    b = x.mean() * y.mean() - quantile * xy
    c = x.mean() ** 2 - quantile * xx
    root = math.sqrt(max(b * b - a * c, 0.0))
    return Interval(float(x.mean() / y.mean()), float((b - root) / a), float((b + root) / a))


def difference(control: Sequence[float], pretrained: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean of control - pretrained over seeds, with the paired t interval; arguments as for `share`."""
    x, y = _paired(control, pretrained)
    d = x - y
    if not np.isfinite(d).all():
        return Interval(None, None, None, "a run diverged")
    half = float(student.ppf((1 + confidence) / 2, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d)))
    return Interval(float(d.mean()), float(d.mean()) - half, float(d.mean()) + half)


def _paired(control: Sequence[float], pretrained: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(control, dtype=float), np.asarray(pretrained, dtype=float)
    if x.shape != y.shape or x.size < 2:
        raise ValueError(f"an interval over seeds needs two or more of both arms, not {x.size} and {y.size}")
    return x, y
