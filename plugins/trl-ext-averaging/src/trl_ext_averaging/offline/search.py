"""Averages chosen by a metric: the points of a sweep, and the greedy soup."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trl_ext_averaging.offline.average import Plan, average
from trl_ext_averaging.offline.checkpoint import Checkpoint
from trl_ext_averaging.offline.metric import Metric


@dataclass(frozen=True)
class Point:
    """One average that was tried."""

    value: float
    score: float


@contextmanager
def candidate(plan: Plan, near: Path) -> Iterator[Path]:
    """A plan's average in a folder that is gone afterwards, on the file system of `near`."""
    near.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=near.parent, prefix=f".{near.name}.candidate-") as folder:
        path = Path(folder) / "average"
        average(plan, path)
        yield path


def sweep(plans: Mapping[float, Plan], metric: Metric, near: Path, note: Callable[[Point], None]) -> list[Point]:
    """Score the average at each value, in order."""
    points = []
    for value, plan in plans.items():
        with candidate(plan, near) as folder:
            points.append(Point(value, metric(folder)))
        note(points[-1])
    return points


def best(points: Sequence[Point], maximize: bool) -> Point:
    """The best point; of equal ones the first."""
    return max(points, key=lambda point: point.score if maximize else -point.score)


def greedy_soup(
    inputs: Sequence[Checkpoint],
    plan: Callable[[Sequence[Checkpoint]], Plan],
    metric: Metric,
    maximize: bool,
    near: Path,
    note: Callable[[str, float, bool], None],
) -> list[Checkpoint]:
    """Add inputs, the best first, to a mean as long as it does not get worse (arXiv:2203.05482, recipe 1).

    Args:
        plan: the mean of some inputs, as a plan.
        note: told what was tried, its score, and whether it was kept.
    """
    sign = 1.0 if maximize else -1.0
    scores = {checkpoint.path: sign * metric(checkpoint.path) for checkpoint in inputs}
    for checkpoint in inputs:
        note(f"{checkpoint.path} alone", sign * scores[checkpoint.path], True)
    first, *rest = sorted(inputs, key=lambda checkpoint: -scores[checkpoint.path])
    chosen, score = [first], scores[first.path]
    for checkpoint in rest:
        with candidate(plan([*chosen, checkpoint]), near) as folder:
            tried = sign * metric(folder)
        note(f"with {checkpoint.path}", sign * tried, tried >= score)
        if tried >= score:
            chosen.append(checkpoint)
            score = tried
    return chosen


def plot(points: Sequence[Point], path: Path, xlabel: str, ylabel: str) -> None:
    """Draw a sweep's curve as PNG."""
    from matplotlib.figure import Figure  # an optional extra

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    axes.plot([point.value for point in points], [point.score for point in points], marker="o")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
