"""The picture of a summary, without pyplot's global state."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from trl_ext_reachability.from_scratch.conclusions import MOST, WHERE

_COLOURS = {"in": "C0", "out": "C1"}
_LINES = {"pretrained": "--", "scratch": "-", "embeddings": ":"}


def draw(summary: Mapping[str, Any]) -> bytes:
    """A PNG: the scores with their floors, S with its intervals, and the nll gap, against tokens.

    The same summary gives the same bytes.
    """
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    scores, shares, gaps = figure.subplots(1, 3)
    points = summary["points"]
    tokens = [point["tokens"] for point in points]
    for name, facts in summary["sets"].items():
        colour = _COLOURS[name]
        scores.axhline(facts["floor"], color=colour, linewidth=0.8, alpha=0.5)
        for arm, style in _LINES.items():
            if arm not in summary["arms"]:
                continue
            label = f"{arm}, {WHERE[name]}"
            values = np.array([point["score"][name][arm] for point in points])
            scores.plot(tokens, values.mean(1), style, color=colour, marker=".", label=label)
            scores.fill_between(tokens, values.min(1), values.max(1), color=colour, alpha=0.15, linewidth=0)
            if arm != "pretrained":
                for axes, key in ((shares, "share"), (gaps, "nll_gap")):
                    _band(axes, tokens, [point[key][name].get(arm) for point in points], style, colour, label)
    shares.axhline(MOST, color="0.5", linestyle=":", linewidth=0.8)
    shares.set_ylim(-0.25, 1.5)
    gaps.axhline(0, color="0.5", linewidth=0.8)
    level = f"{summary['settings']['confidence']:.0%}"
    scores.set(ylabel="score", title="Scores: mean and range; thin: floors")
    shares.set(ylabel="S", title=f"Share S, {level} interval over seeds")
    gaps.set(ylabel="nll - nll of pre-trained (nats per token)", title=f"nll gap, {level} interval over seeds")
    for axes in (scores, shares, gaps):
        axes.set_xlabel("tokens trained on")
        axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    figure.legend(*scores.get_legend_handles_labels(), loc="outside lower center", ncols=len(summary["arms"]))
    file = io.BytesIO()
    # Without its date and version, the same measurement gives the same bytes.
    figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
    return file.getvalue()


def _band(axes: Any, tokens: list[float], intervals: list[Any], style: str, colour: str, label: str) -> None:
    """A line with its interval; nothing where it is undefined."""
    empty = {"value": None, "low": None, "high": None}
    table = [[(interval or empty)[key] for key in empty] for interval in intervals]
    value, low, high = np.array(table, dtype=float).T
    axes.plot(tokens, value, style, color=colour, marker=".", label=label)
    axes.fill_between(tokens, low, high, color=colour, alpha=0.15, linewidth=0)
