"""The picture of a comparison: it says what its marks and numbers are, and no text lies on another."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from trl_ext_probing.comparing import compare_plot
from trl_ext_probing.comparing.compare_summary import Cell, Metric
from trl_ext_probing.comparing.measures import measure_of
from trl_ext_probing.intervals import seed_mean

DRIFT = {
    "RL": (0.026, 0.0, -0.003),
    "SFT, then RL": (-0.087, -0.069, -0.018),
    "parallel averaging": (-0.088, -0.095, -0.073),
}
"""Changes of a loss whose axis would have nine ticks of six characters."""


def metric(name: str, base: float | None) -> Metric:
    cells = {arm: Cell(values, seed_mean(values, 0.95), None, None) for arm, values in DRIFT.items()}
    return Metric(name, "change, nats per token", "lower", base, cells)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The figure of two metrics, laid out."""
    figures: list[Any] = []
    monkeypatch.setattr(compare_plot, "save", lambda whole, path: figures.append(whole))
    compare_plot.draw_comparison([metric("drift/nll", None), metric("test/nll", 0.04)], 0.9, Path("unused"))
    (figure,) = figures
    FigureCanvasAgg(figure).draw()
    return figure


def test_no_number_of_an_axis_touches_the_next(drawn: Any) -> None:
    for axis in drawn.axes:
        low, high = axis.get_xlim()
        shown = [label for label in axis.get_xticklabels() if low <= label.get_position()[0] <= high]
        assert len(shown) > 2
        boxes = [label.get_window_extent() for label in shown]
        space = boxes[0].height / 2  # half of a line's height
        assert all(a.x1 + space < b.x0 or b.x1 + space < a.x0 for a, b in combinations(boxes, 2))


def test_axes_have_units_and_every_mark_its_line_in_the_legend(drawn: Any) -> None:
    assert [axis.get_xlabel() for axis in drawn.axes] == [
        "drift/nll (change, nats per token; lower is better)",
        "test/nll (change, nats per token; lower is better)",
    ]
    (legend,) = drawn.legends
    marks = [text.get_text() for text in legend.get_texts()]
    assert marks == ["one seed", "mean, 90% interval", "mean of RL", "before training"]
    inside = [axis.get_window_extent() for axis in drawn.axes]
    assert not any(legend.get_window_extent().overlaps(box) for box in inside)


@pytest.mark.parametrize(
    ("kind", "options", "metric_name", "unit"),
    [
        ("loss", {"dataset": "d.jsonl"}, "nll, kind=long", "nats per token"),
        ("drift", {"dataset": "d.jsonl"}, "nll", "change, nats per token"),
        ("drift", {"dataset": "d.jsonl"}, "accuracy", "change, share of tokens"),
        ("passk", {"dataset": "d.jsonl", "reward": "m:f", "n": 2, "k": "1,2"}, "pass@2", "share of problems"),
        ("function", "m:f", "width", ""),
    ],
)
def test_each_measure_knows_the_unit_of_its_values(kind: str, options: Any, metric_name: str, unit: str) -> None:
    assert measure_of("measures: held", {kind: options}).unit(metric_name) == unit


def test_a_value_of_unknown_unit_has_none_in_its_title() -> None:
    assert Metric("width", "", "higher", None, {}).title == "width (higher is better)"
