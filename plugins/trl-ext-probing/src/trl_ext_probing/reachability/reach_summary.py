"""A measurement in numbers: routes, likelihood quantiles, and what training is predicted to solve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from trl_ext_probing.intervals import mean_difference
from trl_ext_probing.reachability.measurement import Measurement
from trl_ext_probing.reachability.routing import ROUTES
from trl_ext_probing.reachability.statistics import likelihood_quantile

CURVE = tuple(i / 100 for i in range(101))
"""Shares of the prompts at which the quantile curves are kept."""
LABELS = {"rollouts": "success rate", "demonstrations": "demonstration", "worst_tokens": "its worst token"}
"""What the quantile curves are of."""

Records = Sequence[Mapping[str, Any]]


def summarize(measurements: Sequence[Measurement], records: Sequence[Records]) -> list[dict[str, Any]]:
    """What `results.json` says of each model, of the others with their difference to the first."""
    models = [
        {"model": m.model, "weights": m.journal.about["weights"], **_summary(m, own)}
        for m, own in zip(measurements, records, strict=True)
    ]
    confidence = measurements[0].settings.confidence
    rates = [[r["first_successes"] / max(r["first_rollouts"], 1) for r in of_model] for of_model in records]
    for entry, own in zip(models[1:], rates[1:], strict=True):
        entry["difference_from_first"] = asdict(mean_difference(rates[0], own, confidence))
    return models


def _summary(measurement: Measurement, records: Records) -> dict[str, Any]:
    """Routes, curves and the predicted solved share. Logarithms are natural; null stands for the logarithm of 0."""
    _, trials, successes = measurement.counts()
    prior = measurement.prior
    lines = measurement.demonstrations.values()
    shown = [line for line in lines if not line["too_long"]]
    with np.errstate(divide="ignore"):
        curves = {"rollouts": likelihood_quantile(np.log(successes / trials), CURVE)}
        if shown:
            likelihoods = [line["log_likelihood"] for line in shown]
            curves["demonstrations"] = likelihood_quantile(likelihoods, CURVE)
            curves["worst_tokens"] = likelihood_quantile(np.log([line["worst_token"] for line in shown]), CURVE)
    reached = prior.reached(successes, trials, measurement.settings.budget.draws)
    return {
        "rollouts": int(trials.sum()),
        "success_rate": float((successes / trials).mean()),
        "routes": {route: sum(record["route"] == route for record in records) for route in ROUTES},
        "predicted_solved_share": float(reached.mean()),
        "prior": list(prior),
        "informative_group": float(np.mean([record["informative_group"] for record in records])),
        "demonstrations_too_long": sum(line["too_long"] for line in lines),
        "demonstrations_refused": sum(not line["correct"] for line in shown),
        "curve_shares": list(CURVE),
        "log_quantiles": {name: curve.tolist() for name, curve in curves.items()},
    }
