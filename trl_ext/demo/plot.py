"""The demo's plot: held-out exact match by run, and held-out NLL over the fine-tuning."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

STYLES = {
    "nll": ("#D55E00", "--"),
    "nll + ema": ("#D55E00", "-"),
    "power": ("#0072B2", "--"),
    "power + ema": ("#0072B2", "-"),
}
"""Colour and line of each run: the objective by the colour (Okabe and Ito's, which colour-blind readers tell apart)."""
GREY = "0.4"


def plot(results: dict[str, Any], path: Path) -> None:
    """Write `results` (as `results.json` holds them) to `path` as a picture."""
    # Figure and canvas without pyplot: no global state, no display needed.
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _draw_exact_match(left, results)
    _draw_held_out_nll(right, results["runs"])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    settings = results["settings"]
    figure.suptitle(
        f"{settings['epochs']} epochs on {settings['demonstrations']} demonstrations, {settings['noise']:.0%} wrong; "
        f"seeds: {settings['seeds']}"
    )
    figure.savefig(path, dpi=120)


def _draw_exact_match(axes: Axes, results: dict[str, Any]) -> None:
    """A dot for each seed, and a bar at their mean."""
    for place, (name, run) in enumerate(results["runs"].items()):
        scores = run["exact_match"]
        axes.plot([place] * len(scores), scores, "o", color=STYLES[name][0], alpha=0.6, markeredgewidth=0)
        axes.hlines(statistics.mean(scores), place - 0.25, place + 0.25, color=STYLES[name][0], linewidth=2)
    axes.axhline(results["base"], color=GREY, linestyle=":")
    axes.annotate("base model", (len(results["runs"]) - 0.5, results["base"]), ha="right", va="bottom", color=GREY)
    axes.set_xticks(range(len(results["runs"])), results["runs"])
    axes.set(ylim=(0, 1.05), xlim=(-0.5, len(results["runs"]) - 0.5))
    axes.set_ylabel("held-out exact match (dots: seeds, line: mean)")


def _draw_held_out_nll(axes: Axes, runs: dict[str, Any]) -> None:
    """The mean over the seeds, in a band from the least to the greatest, with the run's name at the end of its line."""
    for name, run in runs.items():
        color, line = STYLES[name]
        steps = [int(step) for step in run["held_out_nll"]]
        values = list(run["held_out_nll"].values())
        mean = [statistics.mean(seeds) for seeds in values]
        axes.plot(steps, mean, line, color=color)
        axes.fill_between(
            steps, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.12, linewidth=0
        )
        axes.annotate(name, (steps[-1], mean[-1]), xytext=(4, 0), textcoords="offset points", va="center", color=color)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("held-out NLL, nats per token (band: all seeds)")
    axes.margins(x=0.02)
    axes.set_xlim(right=axes.get_xlim()[1] * 1.28)
