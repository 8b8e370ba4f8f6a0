"""A measurement in numbers: routes, likelihood quantiles, and what training is predicted to solve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trl_ext_reachability.measurement import Measurement
from trl_ext_reachability.routing import ROUTES
from trl_ext_reachability.statistics import likelihood_quantile

CURVE = tuple(i / 100 for i in range(101))
"""Shares of the prompts at which the quantile curves are kept."""
LABELS = {"rollouts": "success rate", "demonstrations": "demonstration", "worst_tokens": "its worst token"}
"""What the quantile curves are of."""


def summarize(measurement: Measurement, prompts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Routes, curves and the predicted solved share. Logarithms are natural; null stands for the logarithm of 0."""
    settings = measurement.settings
    trials, successes = measurement.trials, measurement.successes
    prior = measurement.prior
    with np.errstate(divide="ignore"):
        curves = {"rollouts": likelihood_quantile(np.log(successes / trials), CURVE)}
        shown = measurement.demonstrated
        if shown.any():
            curves["demonstrations"] = likelihood_quantile(measurement.log_likelihoods[shown], CURVE)
            curves["worst_tokens"] = likelihood_quantile(np.log(measurement.worst[shown, 0]), CURVE)
    reached = prior.reached(successes, trials, settings.budget.draws)
    return {
        "settings": settings.as_dict(),
        "prompts": len(prompts),
        "rollouts": int(trials.sum()),
        "rounds": settings.totals,
        "closing_rollouts": settings.closing_rollouts,
        "closes": settings.closes,
        "success_rate": float((successes / trials).mean()),
        "routes": {route: sum(record["route"] == route for record in prompts) for route in ROUTES},
        "predicted_solved_share": float(reached.mean()),
        "prior": list(prior),
        "informative_group": float(np.mean([record["informative_group"] for record in prompts])),
        "demonstrations_too_long": int(measurement.too_long.sum()),
        "demonstrations_refused": int((shown & ~measurement.correct).sum()),
        "curve_shares": list(CURVE),
        "log_quantiles": {
            name: [float(value) if np.isfinite(value) else None for value in curve] for name, curve in curves.items()
        },
    }
