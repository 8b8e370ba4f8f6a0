"""The demo's plot: exact match by run, and how far each objective fits its demonstrations."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def plot(results: dict[str, Any], path: Path) -> None:
    """Write `results` (as `results.json` holds them) to `path` as a picture."""
    # Figure and canvas without pyplot: no global state, no display needed.
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for place, (name, run) in enumerate(results["runs"].items()):
        scores = run["exact_match"]
        left.bar(place, statistics.mean(scores), width=0.6, alpha=0.5)
        left.plot([place] * len(scores), scores, "k.", markersize=5)
        steps = [int(step) for step in run["nll"]]
        right.plot(steps, list(run["nll"].values()), "--" if "ema" in name else "-", label=name)
    left.axhline(results["base"], color="grey", linestyle=":", label="base model")
    left.set_xticks(range(len(results["runs"])), results["runs"])
    left.set_ylim(0, 1.05)
    left.set_ylabel("held-out exact match (bar: mean, dots: seeds)")
    left.legend(loc="lower left", fontsize="small")
    right.set_xlabel("optimiser step")
    right.set_ylabel("training NLL (nats per token)")
    right.legend(fontsize="small")
    settings = results["settings"]
    figure.suptitle(
        f"{settings['epochs']} epochs on {settings['demonstrations']} demonstrations, {settings['noise']:.0%} wrong"
    )
    figure.savefig(path, dpi=120)
