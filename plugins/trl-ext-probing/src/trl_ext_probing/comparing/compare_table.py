"""A comparison in Markdown: a table for each metric, and one of the costs."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from trl_ext.jobs import Costs
from trl_ext_probing.comparing.compare_summary import Cell, Found, Metric
from trl_ext_probing.tables import shown, table

DIGITS = 4
HEAD = ("arm", "mean", "each seed", "difference from the first", "seeds to show it")
COSTS_HEAD = ("arm", "minutes", "against the first", "peak memory, GB", "tokens", "steps")


def describe(found: Found) -> str:
    """The tables, and what a reader has to know of them."""
    parts = []
    for metric in found.metrics:
        parts += [f"### {metric.title}\n", table(HEAD, cells_of(metric))]
    parts += ["### Costs of one run\n", table(COSTS_HEAD, costs_of(found))]
    return "\n".join([*parts, *notes(found)])


def cells_of(metric: Metric) -> Iterator[list[str]]:
    """The rows of a metric, the first of which is the model before any training."""
    if metric.base is not None:
        yield ["(before training)", number(metric.base), "", "", ""]
    for i, (arm, cell) in enumerate(metric.cells.items()):
        each = ", ".join("none" if value is None else number(value) for value in cell.values)
        yield [arm, _mean(cell), each, verdict(cell) if i else "", seeds(cell) if i else ""]


def _mean(cell: Cell) -> str:
    if cell.mean is None or cell.mean.value is None:
        return "none"
    return number(cell.mean.value) if cell.mean.low is None else shown(cell.mean, DIGITS)


def verdict(cell: Cell) -> str:
    """The difference with its interval, marked where this leaves out 0."""
    if cell.difference is None:
        return "needs two pairs"
    return shown(cell.difference, DIGITS, "+") + (" *" if cell.distinct else "")


def seeds(cell: Cell) -> str:
    """How many seeds would show the difference."""
    return "" if cell.difference is None else str(cell.seeds_needed or "more than 10000")


def costs_of(found: Found) -> Iterator[list[str]]:
    """The rows of the costs, each a mean over runs."""
    first: float | None = None
    for arm, costs in found.costs.items():
        if not costs:
            yield [arm, *["none"] * (len(COSTS_HEAD) - 1)]
            continue
        seconds = statistics.mean(cost.seconds for cost in costs)
        first = seconds if first is None else first
        yield [
            arm,
            f"{seconds / 60:.2f}",
            f"{seconds / first:.2f}x",
            f"{_mean_of(costs, 'peak_memory') / 1e9:.2f}",
            f"{_mean_of(costs, 'tokens'):,.0f}",
            f"{_mean_of(costs, 'steps'):,.0f}",
        ]


def _mean_of(costs: Sequence[Costs], name: str) -> float:
    return statistics.mean(getattr(cost, name) for cost in costs)


def notes(found: Found) -> Iterator[str]:
    """What a reader has to know."""
    confidence, count = found.settings.confidence, len(found.asked.seeds)
    if count == 1:
        yield "One seed tells nothing of others: there are no intervals and no differences."
    else:
        yield (
            f"Intervals of {confidence:.0%} over {count} seeds; differences are paired by seed, and * marks those "
            "whose interval leaves out 0, with no allowance for how many there are. Seeds to show it: with so many a "
            "paired t-test would find a difference of this size with a probability of 80%."
        )
    if found.rates:
        rates = ", ".join(f"{arm} {rate:g}" for arm, rate in found.rates.items())
        tuning = found.asked.tuning
        assert tuning is not None
        yield f"Learning rates were chosen by {tuning.measure} on seeds that are not reported: {rates}."
    if found.missing:
        yield f"Missing: {'; '.join(found.missing)}."
    yield f"Time and memory on {found.hardware}."


def number(value: float) -> str:
    """A value without an interval."""
    return f"{value:.{DIGITS}f}"
