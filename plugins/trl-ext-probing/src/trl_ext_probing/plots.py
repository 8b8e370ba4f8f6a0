"""The look of all pictures: colours that colour-blind readers tell apart, intervals, and files that do not change.

Pictures are made without pyplot, which has global state and wants a display.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from trl_ext_probing.intervals import Estimate

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
"""Okabe and Ito's; neighbours differ in lightness too. Red and green never stand for bad and good."""
GREY = "0.45"
MARKERS = "osD^vP*X"


def figure(columns: int = 1, rows: int = 1, size: tuple[float, float] | None = None, **options: Any) -> tuple[Any, Any]:
    """A figure and its axes, of which numbers are never shown relative to an offset.

    Args:
        columns, rows: Of axes.
        size: In inches; 4.8 by 3.8 for each of the axes by default.
        **options: Of matplotlib's `Figure.subplots`.
    """
    from matplotlib.figure import Figure

    whole = Figure(figsize=size or (4.8 * columns, 3.8 * rows), layout="constrained")
    axes = whole.subplots(rows, columns, **options)
    for axis in np.ravel(axes):
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
        axis.ticklabel_format(useOffset=False)
    return whole, axes


def draw_estimates(
    axis: Any, x: Sequence[float], estimates: Sequence[Estimate | None], series: int, label: str, line: str = "-"
) -> None:
    """Points with their intervals, joined by a line; those of several series differ in colour and mark.

    Args:
        axis: Of matplotlib.
        x: Positions.
        estimates: One for each position; one that is missing or undefined leaves a gap.
        series: Number of the series, from 0.
        label: For the legend.
        line: Style of the line; "" for none.
    """
    table = np.array([[np.nan] * 3 if e is None else [e.value, e.low, e.high] for e in estimates], dtype=float)
    value, low, high = table.T if len(table) else np.empty((3, 0))
    errors = np.maximum([value - low, high - value], 0.0)
    axis.errorbar(
        x,
        value,
        errors,
        color=COLOURS[series % len(COLOURS)],
        marker=MARKERS[series % len(MARKERS)],
        linestyle=line or "none",
        markersize=5,
        capsize=3,
        label=plain(label),
    )


def plain(text: str) -> str:
    """A name as it is: matplotlib would read what stands between two dollar signs as a formula, or refuse it."""
    return text.replace("$", r"\$")


def short_names(models: Iterable[str]) -> list[str]:
    """Names for legends and ticks: as many of the last parts of the paths as tell them apart."""
    parts = [Path(model).parts for model in models]
    longest = max(map(len, parts))
    count = next((n for n in range(1, longest) if len({p[-n:] for p in parts}) == len(set(parts))), longest)
    return ["/".join(p[-count:]) for p in parts]


def undefined(axis: Any, why: str) -> None:
    """Say in an empty picture why it is empty."""
    text = "\n".join(fill(line, 36) for line in why.splitlines())
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", color="0.2")
    axis.set(xticks=[], yticks=[])


def log_axis_with_zero(axis: Any, smallest: float) -> None:
    """A logarithmic y axis for values in [0, 1] on which 0 has a place of its own, marked as 0.

    Args:
        axis: Of matplotlib.
        smallest: The smallest value above 0 that is shown.
    """
    decades = -int(np.floor(np.log10(min(max(smallest, 1e-300), 0.1))))
    decade = 10.0**-decades
    axis.set_yscale("symlog", linthresh=decade, linscale=max(0.5, decades / 12))
    exponents = range(0, decades + 1, -(-decades // 8))  # of whole answers, likelihoods go down to 1e-60 and less
    ticks = {0.0: "0", **{10.0**-e: f"{10.0**-e:g}" for e in exponents}}
    axis.set_yticks(list(ticks), list(ticks.values()))
    axis.set_ylim(-decade / 4, max(1.3, 10 ** (decades / 30)))


def save(whole: Any, path: Path) -> None:
    """Write a PNG; without its date and version, the same picture gives the same bytes."""
    whole.savefig(path, dpi=150, metadata={"Software": None})
