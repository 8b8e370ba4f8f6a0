"""The picture of a comparison: of each metric every seed of every arm, and the means with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_ext_probing.comparing.compare_summary import Metric
from trl_ext_probing.plots import COLOURS, GREY, figure, plain, save, undefined

_COLUMNS = 2


def draw_comparison(metrics: Sequence[Metric], confidence: float, path: Path) -> None:
    """Write the picture; arms are beneath one another, the first on top, whose mean is a line through all.

    Args:
        metrics: One to an axis.
        confidence: Of the intervals, for the legend.
        path: Where to.
    """
    if not metrics:
        whole, axis = figure()
        undefined(axis, "no model has been measured yet")
        save(whole, path)
        return
    columns = min(len(metrics), _COLUMNS)
    rows = -(-len(metrics) // _COLUMNS)
    arms = len(metrics[0].cells)
    size = (0.8 + 4.2 * columns, rows * (1.4 + 0.45 * arms))
    whole, axes = figure(columns, rows, size, squeeze=False)
    for axis, metric in zip(axes.flat, metrics, strict=False):
        _draw(axis, metric)
    for axis in axes.flat[len(metrics) :]:
        axis.set_visible(False)
    _explain(whole, metrics, confidence)
    save(whole, path)


def _draw(axis: Any, metric: Metric) -> None:
    for place, cell in enumerate(metric.cells.values()):
        colour = COLOURS[place % len(COLOURS)]
        known = [value for value in cell.values if value is not None]
        axis.plot(known, [place] * len(known), "o", color=colour, alpha=0.45, markersize=5, markeredgewidth=0)
        if cell.mean is None or cell.mean.value is None:
            continue
        axis.plot([cell.mean.value], [place], "|", color=colour, markersize=16, markeredgewidth=2.5)
        if cell.mean.low is not None and cell.mean.high is not None:
            axis.hlines(place, cell.mean.low, cell.mean.high, color=colour, linewidth=1.5)
    first = next(iter(metric.cells.values())).mean
    if first is not None and first.value is not None:
        axis.axvline(first.value, color=COLOURS[0], linewidth=0.8, linestyle="--")
    if metric.base is not None:
        axis.axvline(metric.base, color=GREY, linewidth=1, linestyle=":")
    axis.set_yticks(range(len(metric.cells)), [plain(arm) for arm in metric.cells], fontsize=8)
    axis.set_ylim(len(metric.cells) - 0.5, -0.5)
    axis.set_xlabel(plain(metric.title), fontsize=8)
    axis.tick_params(axis="x", labelsize=7)
    axis.locator_params(axis="x", nbins=6)  # long numbers, such as -0.125, would touch one another


def _explain(whole: Any, metrics: Sequence[Metric], confidence: float) -> None:
    """Say beneath the axes what their marks are."""
    from matplotlib.lines import Line2D

    seed = Line2D([], [], color=GREY, marker="o", linestyle="none", alpha=0.45, markersize=5, markeredgewidth=0)
    mean = Line2D([], [], color=GREY, marker="|", linewidth=1.5, markersize=9, markeredgewidth=2)
    first = Line2D([], [], color=COLOURS[0], linestyle="--", linewidth=0.8)
    name = next(iter(metrics[0].cells))
    marks = {"one seed": seed, f"mean, {confidence:.0%} interval": mean, f"mean of {plain(name)}": first}
    if any(metric.base is not None for metric in metrics):
        marks["before training"] = Line2D([], [], color=GREY, linestyle=":", linewidth=1)
    columns = 2 if len(metrics) == 1 else len(marks)
    whole.legend(list(marks.values()), list(marks), loc="outside lower center", ncols=columns, fontsize=7)
