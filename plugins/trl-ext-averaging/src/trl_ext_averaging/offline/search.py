"""Averages chosen by a metric: the points of a sweep, and the greedy soup."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trl_ext_probing.plots import COLOURS, figure, save

from trl_ext_averaging.offline.checkpoint import Checkpoint
from trl_ext_averaging.offline.metric import Metric
from trl_ext_averaging.offline.plan import Plan


@dataclass(frozen=True)
class Point:
    """One average that was tried."""

    value: float
    score: float


@contextmanager
def candidate(plan: Plan, folder: Path) -> Iterator[Path]:
    """A plan's average in a folder inside of `folder` that is gone afterwards."""
    path = folder / "candidate"
    path.mkdir()
    try:
        plan.write(path)
        yield path
    finally:
        shutil.rmtree(path)


def sweep(plans: Mapping[float, Plan], metric: Metric, folder: Path, note: Callable[[Point], None]) -> list[Point]:
    """Score the average at each value, in order; `folder` is a place to write them."""
    points = []
    for value, plan in plans.items():
        with candidate(plan, folder) as path:
            points.append(Point(value, metric(path)))
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
    folder: Path,
    note: Callable[[str, float, bool], None],
) -> list[Checkpoint]:
    """Add inputs, the best first, to a mean as long as it does not get worse (arXiv:2203.05482, recipe 1).

    Args:
        inputs: the models.
        plan: the mean of some inputs, as a plan.
        metric: what scores a folder.
        maximize: whether larger scores are better.
        folder: a place to write candidates.
        note: told what was tried, its score, and whether it was kept.
    """
    sign = 1.0 if maximize else -1.0
    scores = [sign * metric(checkpoint.path) for checkpoint in inputs]
    for checkpoint, score in zip(inputs, scores, strict=True):
        note(f"{checkpoint.path} alone", sign * score, True)
    order = sorted(range(len(inputs)), key=lambda i: -scores[i])
    chosen, score = [inputs[order[0]]], scores[order[0]]
    for i in order[1:]:
        with candidate(plan([*chosen, inputs[i]]), folder) as path:
            tried = sign * metric(path)
        note(f"with {inputs[i].path}", sign * tried, tried >= score)
        if tried >= score:
            chosen.append(inputs[i])
            score = tried
    return chosen


def plot(points: Sequence[Point], best_point: Point, path: Path, xlabel: str, ylabel: str) -> None:
    """Draw a sweep's curve as PNG, with the best point marked."""
    whole, axis = figure()
    axis.plot([p.value for p in points], [p.score for p in points], color=COLOURS[0], marker="o")
    label = f"best: {best_point.value:g} ({best_point.score:.4g})"
    axis.plot([best_point.value], [best_point.score], "*", color=COLOURS[1], markersize=16, label=label)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.legend()
    save(whole, path)
