"""Pictures of a measurement, without pyplot's global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from trl_ext_reachability.reach_summary import LABELS
from trl_ext_reachability.routing import ROUTES, Budget


def draw_reachability(summary: Mapping[str, Any], prompts: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The quantile curves, the bounds of each prompt with the cuts between routes, and the routes."""
    settings = summary["settings"]
    budget = Budget(settings["num_generations"], settings["epochs"])
    figure = Figure(figsize=(13, 4), layout="constrained")
    curves, bounds, routes = figure.subplots(1, 3)
    for name, curve in summary["log_quantiles"].items():
        values = np.array([np.nan if value is None else value for value in curve]) / np.log(10)
        curves.plot(summary["curve_shares"], values, drawstyle="steps-post", label=LABELS[name])
    curves.set(xlabel="share eps of the prompts", ylabel="log10 Q(eps)", title="Likelihood quantiles")
    curves.legend()
    ordered = sorted(prompts, key=lambda record: (record["successes"] / record["rollouts"], record["low"]))
    place = np.arange(len(ordered))
    bounds.fill_between(
        place, [r["low"] for r in ordered], [r["high"] for r in ordered], alpha=0.4, label="bounds", linewidth=0
    )
    bounds.plot(place, [r["successes"] / r["rollouts"] for r in ordered], label="rate")
    for cut in budget.cuts:
        bounds.axhline(min(cut, 1.0), color="0.5", linestyle=":", linewidth=1)
    bounds.set(xlabel="prompt, by rate", ylabel="success rate", title="Success rates; dotted: cuts between routes")
    bounds.legend()
    routes.barh(list(ROUTES), [summary["routes"][route] for route in ROUTES])
    routes.invert_yaxis()
    routes.set(xlabel="prompts", title=f"Routes at {budget.draws} draws a prompt")
    # Without its date and version, the same measurement gives the same bytes.
    figure.savefig(path, dpi=120, metadata={"Software": None})


def draw_calibration(result: Mapping[str, Any], path: Path) -> None:
    """Observed against predicted share of each bin with its bounds, and how many prompts there are in each."""
    figure = Figure(figsize=(5, 5.5), layout="constrained")
    curve, counts = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    bins = result["bins"]
    x, y = [b["predicted"] for b in bins], np.array([b["observed"] for b in bins])
    bars = np.array([[b["observed"] - b["low"], b["high"] - b["observed"]] for b in bins]).T
    curve.plot([0, 1], [0, 1], color="0.5", linestyle=":", linewidth=1, label="calibrated")
    curve.errorbar(x, y, yerr=np.maximum(bars, 0), marker="o", capsize=3, label="observed, 95 % bounds")
    curve.axhline(result["observed_share"], color="C1", linewidth=1, label="best constant")
    curve.set(
        ylabel="observed share solved",
        title=f"Solved in {result['draws']} draws; calibration error {result['ece']:.3f}\n"
        f"Brier score {result['brier']:.3f} (best constant: {result['brier_constant']:.3f})",
    )
    curve.legend()
    counts.bar([(b["from"] + b["to"]) / 2 for b in bins], [b["prompts"] for b in bins], width=0.9 / 10)
    counts.set(xlabel="predicted probability", ylabel="prompts", xlim=(-0.02, 1.02))
    figure.savefig(path, dpi=120, metadata={"Software": None})


def draw_queries(alphas: Sequence[float], draws: Sequence[int], bins: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws until the first success against 1/alpha, of each prompt and on average; see `queries.query_ratios`."""
    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axis = figure.subplots()
    x, y = 1 / np.asarray(alphas), np.asarray(draws)
    axis.loglog(x[y > 0], y[y > 0], ".", alpha=0.25, label="one prompt")
    axis.loglog([b["expected"] for b in bins], [b["mean_draws"] for b in bins], "o", label="mean of a bin")
    axis.loglog([1, x.max()], [1, x.max()], color="0.5", linestyle=":", label="1/alpha")
    axis.set(xlabel="1/alpha", ylabel="draws until the first success", title="Queries to success")
    axis.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})
