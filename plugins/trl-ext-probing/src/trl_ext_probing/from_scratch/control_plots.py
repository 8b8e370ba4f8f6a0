"""The picture of the from-scratch control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trl_ext_probing.from_scratch.conclusions import MOST, WHERE
from trl_ext_probing.from_scratch.control_settings import FromScratchSettings
from trl_ext_probing.plots import COLOURS, GREY, MARKERS, figure, save, undefined

_LINES = {"pretrained": "--", "scratch": "-", "embeddings": ":"}


def draw(settings: FromScratchSettings, summary: Mapping[str, Any], path: Path) -> None:
    """The scores with their floors, S with its intervals, and the nll gap, against tokens."""
    from matplotlib.ticker import MaxNLocator

    whole, (scores, shares, gaps) = figure(3)
    points = summary["points"]
    tokens = [point["tokens"] for point in points]
    for colour, marker, (name, facts) in zip(COLOURS, MARKERS, summary["sets"].items(), strict=False):
        scores.axhline(facts["floor"], color=colour, linewidth=0.8, alpha=0.6)
        for arm, style in _LINES.items():
            if arm not in summary["arms"]:
                continue
            look = {"color": colour, "linestyle": style, "marker": marker, "markersize": 4}
            values = np.array([point["score"][name][arm] for point in points])
            _line(scores, tokens, values.mean(1), values.min(1), values.max(1), f"{arm}, {WHERE[name]}", look)
            if arm != "pretrained":
                for axis, key in ((shares, "share"), (gaps, "nll_gap")):
                    _band(axis, tokens, [point[key][name].get(arm) for point in points], f"{arm}, {WHERE[name]}", look)
    shares.axhline(MOST, color=GREY, linestyle=":", linewidth=0.8)
    shares.axhline(0, color=GREY, linewidth=0.6)
    gaps.axhline(0, color=GREY, linewidth=0.8)
    level = f"{settings.confidence:.0%}"
    scores.set(ylabel="score (mean reward)", title="Scores: mean and range over seeds; thin: floors")
    shares.set(ylabel="S, share of the gain", title=f"Share S, {level} interval over seeds")
    gaps.set(ylabel="nll - nll of pre-trained (nats per token)", title=f"nll gap, {level} interval over seeds")
    for axis in (scores, shares, gaps):
        axis.set_xlabel("tokens trained on")
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    _say_where_nothing_is(summary, shares, gaps)
    whole.legend(*scores.get_legend_handles_labels(), loc="outside lower center", ncols=len(summary["arms"]))
    save(whole, path)


def _say_where_nothing_is(summary: Mapping[str, Any], shares: Any, gaps: Any) -> None:
    """An undefined share says why, and so does a gap without data."""
    found = [share for point in summary["points"] for of_set in point["share"].values() for share in of_set.values()]
    if all(share["value"] is None for share in found):
        undefined(shares, "S is undefined:\n" + "\n".join(dict.fromkeys(share["reason"] for share in found)))
    else:
        shares.set_ylim(-0.25, 1.5)
    if not any(of_set for point in summary["points"] for of_set in point["nll_gap"].values()):
        undefined(gaps, "no nll: the evaluation sets have no completions")


def _band(axis: Any, tokens: Sequence[float], estimates: Sequence[Any], label: str, look: Mapping[str, Any]) -> None:
    """A line with its interval; a gap where it is undefined."""
    missing = {"value": None, "low": None, "high": None}
    table = [[(estimate or missing)[name] for name in missing] for estimate in estimates]
    value, low, high = np.array(table, dtype=float).T
    _line(axis, tokens, value, low, high, label, look)


def _line(
    axis: Any, tokens: Sequence[float], value: Any, low: Any, high: Any, label: str, look: Mapping[str, Any]
) -> None:
    axis.plot(tokens, value, label=label, **look)
    axis.fill_between(tokens, low, high, color=look["color"], alpha=0.15, linewidth=0)
