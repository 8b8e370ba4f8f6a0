"""Pictures of what `reachability` finds, and of how well its predictions hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trl_ext_probing.plots import COLOURS, GREY, figure, log_axis_with_zero, save, short_names
from trl_ext_probing.reachability.reach_settings import ReachabilitySettings
from trl_ext_probing.reachability.reach_summary import LABELS, Records
from trl_ext_probing.reachability.routing import ROUTES


def draw_reachability(
    settings: ReachabilitySettings, models: Sequence[Mapping[str, Any]], records: Sequence[Records], path: Path
) -> None:
    """For each model the quantile curves, the bounds of each prompt with the cuts between routes, and the routes."""
    whole, axes = figure(3, len(models), squeeze=False)
    names = short_names(model["model"] for model in models)
    for (curves, bounds, routes), name, model, own in zip(axes, names, models, records, strict=True):
        _draw_curves(curves, model)
        _draw_bounds(bounds, settings, own)
        routes.barh(list(ROUTES), [model["routes"][route] for route in ROUTES], color=COLOURS[0])
        routes.invert_yaxis()
        routes.set(xlabel="prompts", title=f"Routes at {settings.budget.draws} draws a prompt")
        if len(models) > 1:
            curves.set_ylabel(f"{name}\n{curves.get_ylabel()}")
    save(whole, path)


def _draw_curves(axis: Any, model: Mapping[str, Any]) -> None:
    drawn = {name: np.exp(np.array(curve, dtype=float)) for name, curve in model["log_quantiles"].items()}
    for (name, curve), colour in zip(drawn.items(), COLOURS, strict=False):
        axis.plot(model["curve_shares"], curve, drawstyle="steps-post", color=colour, label=LABELS[name])
    log_axis_with_zero(axis, min((float(c[c > 0].min()) for c in drawn.values() if (c > 0).any()), default=0.1))
    axis.set(xlabel="share eps of the prompts", ylabel="Q(eps), a probability", title="Likelihood quantiles")
    axis.legend(fontsize=8)


def _draw_bounds(axis: Any, settings: ReachabilitySettings, records: Records) -> None:
    ordered = sorted(records, key=lambda record: (record["successes"] / record["rollouts"], record["low"]))
    place = np.arange(len(ordered))
    rates = np.array([r["successes"] / r["rollouts"] for r in ordered])
    low, high = (np.array([r[name] for r in ordered]) for name in ("low", "high"))
    axis.vlines(place, low, high, color=COLOURS[4], linewidth=2, alpha=0.6)
    axis.plot(place, rates, ".", color=COLOURS[0], markersize=4)
    for cut in settings.budget.cuts:
        axis.axhline(min(cut, 1.0), color=GREY, linestyle=":", linewidth=1)
    log_axis_with_zero(axis, min([*rates[rates > 0], *settings.budget.cuts]))
    # In the title, since a legend would hide some of them.
    title = f"Success rates, {settings.confidence:.0%} bounds over all rounds;\ndotted: cuts between routes"
    axis.set(xlabel="prompt, by rate", ylabel="success rate", title=title)


def draw_calibration(result: Mapping[str, Any], path: Path) -> None:
    """Observed against predicted share of each bin with its bounds, and how many prompts there are in each."""
    whole, (curve, counts) = figure(1, 2, size=(5, 5.5), sharex=True, height_ratios=[4, 1])
    bins = result["bins"]
    x, y = [b["predicted"] for b in bins], np.array([b["observed"] for b in bins])
    bars = np.array([[b["observed"] - b["low"], b["high"] - b["observed"]] for b in bins]).T
    curve.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1, label="calibrated")
    curve.errorbar(
        x, y, yerr=np.maximum(bars, 0), color=COLOURS[0], marker="o", capsize=3, label="observed, 95 % bounds"
    )
    curve.axhline(result["observed_share"], color=COLOURS[1], linewidth=1, label="best constant")
    curve.set(
        ylabel="observed share solved",
        title=f"Solved in {result['draws']} draws; calibration error {result['ece']:.3f}\n"
        f"Brier score {result['brier']:.3f} (best constant: {result['brier_constant']:.3f})",
    )
    curve.legend(fontsize=8)
    counts.bar(
        [(b["from"] + b["to"]) / 2 for b in bins], [b["prompts"] for b in bins], width=0.9 / 10, color=COLOURS[0]
    )
    counts.set(xlabel="predicted probability", ylabel="prompts", xlim=(-0.02, 1.02))
    save(whole, path)
