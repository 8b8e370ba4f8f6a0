"""How well predicted probabilities agree with what happened: pure functions on arrays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import erfinv  # type: ignore[import-untyped]

from trl_ext_probing.intervals import Floats, clopper_pearson

BINS = 10
_SIMULATIONS = 2000


def brier_score(predicted: ArrayLike, observed: ArrayLike) -> float:
    """Mean of (predicted - observed)², from 0 to 1; for both (n,), observed 0 or 1."""
    p, y = _checked(predicted, observed)
    return float(((p - y) ** 2).mean())


def calibration_bins(
    predicted: ArrayLike, observed: ArrayLike, bins: int = BINS, confidence: float = 0.95
) -> list[dict[str, float]]:
    """The calibration curve: prompts by predicted probability, in bins of equal width over [0, 1].

    Args:
        predicted, observed: (n,) probabilities, and 0 or 1.
        bins: their number; a bin has its left edge, the last one both.
        confidence: of the Clopper-Pearson bounds of each observed share.

    Returns:
        For each bin that is not empty `from`, `to`, `prompts`, the mean `predicted`, the share `observed`, and its
        bounds `low` and `high`.
    """
    p, y = _checked(predicted, observed)
    places = _places(p, bins)
    found = []
    for i in np.unique(places):
        mine = places == i
        low, high = clopper_pearson(y[mine].sum(), mine.sum(), confidence)
        found.append(
            {
                "from": float(i / bins),
                "to": float((i + 1) / bins),
                "prompts": int(mine.sum()),
                "predicted": float(p[mine].mean()),
                "observed": float(y[mine].mean()),
                "low": float(low),
                "high": float(high),
            }
        )
    return found


def expected_calibration_error(predicted: ArrayLike, observed: ArrayLike, bins: int = BINS) -> float:
    """Mean over prompts of |mean predicted - share observed| of their bin; bins of equal width over [0, 1].

    It is above 0 by chance alone for a calibrated prediction too, the more so with few prompts per bin:
    `score_calibration` says how far.
    """
    p, y = _checked(predicted, observed)
    return float(_calibration_errors(p, y[None], bins)[0])


def score_calibration(
    predicted: ArrayLike, observed: ArrayLike, bins: int = BINS, confidence: float = 0.95
) -> dict[str, Any]:
    """Scores of a prediction, beside those of the best constant and those that it would have if it were calibrated.

    "If calibrated": each outcome is 1 with exactly the predicted probability, independently. The expected Brier score
    is then mean p (1 - p), and its variance sum p (1 - p) (1 - 2 p)² / n² (Spiegelhalter 1986).

    Args:
        predicted, observed: (n,) probabilities, and 0 or 1.
        bins: of the calibration error, of equal width over [0, 1].
        confidence: of the intervals.

    Returns:
        `predicted_share`, `observed_share`; `brier`, `brier_if_calibrated` (two-sided interval, normal approximation);
        `brier_constant`, that of the observed share for every prompt, which no constant beats and which is known only
        afterwards; `skill` = 1 - brier / brier_constant, None where nothing varies; `ece` and `ece_if_calibrated`
        (upper bound, 2,000 simulated outcomes); `observed_share_if_calibrated`; the `bins`.

    Raises:
        ValueError: no prompts, lengths that differ, predictions outside [0, 1], or outcomes other than 0 and 1.
    """
    p, y = _checked(predicted, observed)
    z = math.sqrt(2) * float(erfinv(confidence))
    brier, constant = brier_score(p, y), brier_score(np.full_like(p, y.mean()), y)
    expected, deviation = float((p * (1 - p)).mean()), float(np.sqrt((p * (1 - p) * (1 - 2 * p) ** 2).sum()) / len(p))
    share, spread = float(p.mean()), float(np.sqrt((p * (1 - p)).sum()) / len(p))
    simulated = (np.random.default_rng(0).random((_SIMULATIONS, len(p))) < p).astype(float)
    return {
        "prompts": len(p),
        "predicted_share": share,
        "observed_share": float(y.mean()),
        "observed_share_if_calibrated": [max(share - z * spread, 0.0), min(share + z * spread, 1.0)],
        "brier": brier,
        "brier_if_calibrated": [max(expected - z * deviation, 0.0), expected + z * deviation],
        "brier_constant": constant,
        "skill": 1 - brier / constant if constant > 0 else None,
        "ece": expected_calibration_error(p, y, bins),
        "ece_if_calibrated": float(np.quantile(_calibration_errors(p, simulated, bins), confidence)),
        "bins": calibration_bins(p, y, bins, confidence),
    }


def _calibration_errors(p: Floats, outcomes: Floats, bins: int) -> Floats:
    """(runs,) expected calibration error of each row of outcomes (runs, n)."""
    places = np.eye(bins)[_places(p, bins)]
    return np.asarray(np.abs((p - outcomes) @ places).sum(axis=1) / len(p))


def _places(p: Floats, bins: int) -> np.ndarray:
    # 1e-9: 0.3 * 10 is 2.9999999999999996.
    return np.minimum(np.floor(p * bins + 1e-9).astype(int), bins - 1)


def _checked(predicted: ArrayLike, observed: ArrayLike) -> tuple[Floats, Floats]:
    p, y = np.asarray(predicted, dtype=float), np.asarray(observed, dtype=float)
    if p.ndim != 1 or p.shape != y.shape or not len(p):
        raise ValueError(f"predicted {p.shape} and observed {y.shape}: two lists of the same length, not empty")
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("predicted has values outside of [0, 1]")
    if not np.isin(y, (0, 1)).all():
        raise ValueError("observed has values other than 0 and 1")
    return p, y
