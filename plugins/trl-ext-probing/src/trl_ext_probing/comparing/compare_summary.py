"""What a comparison says: of each metric the mean over seeds, and the paired difference from the first arm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from trl_ext.jobs import Costs
from trl_ext_probing.comparing.compare_settings import CompareSettings
from trl_ext_probing.comparing.comparison import Comparison
from trl_ext_probing.comparing.measures import Better
from trl_ext_probing.intervals import Estimate, seed_mean, seeds_needed

Values = Mapping[str, float | None]


@dataclass(frozen=True)
class Cell:
    """One metric of one arm."""

    values: tuple[float | None, ...]
    """By seed; None where a run is missing, or its value not finite."""
    mean: Estimate | None
    difference: Estimate | None
    """From the first arm, over the seeds that both have."""
    seeds_needed: int | None
    """To find this difference with a probability of 80 %; None where it is unknown or hopeless."""

    @property
    def distinct(self) -> bool:
        """Whether the interval of the difference leaves out 0."""
        low, high = (None, None) if self.difference is None else (self.difference.low, self.difference.high)
        return low is not None and high is not None and not low <= 0 <= high


@dataclass(frozen=True)
class Metric:
    """One metric of every arm."""

    name: str
    unit: str
    """Of its values; "" where it is not known."""
    better: Better
    base: float | None
    """Of the model before any training."""
    cells: Mapping[str, Cell]
    """By arm, in order."""

    @property
    def title(self) -> str:
        """The metric, its unit, and which values are good."""
        return f"{self.name} ({f'{self.unit}; ' if self.unit else ''}{self.better} is better)"


@dataclass(frozen=True)
class Found:
    """All that a comparison came to, for the table, the picture and the page."""

    settings: CompareSettings
    asked: Comparison
    metrics: Sequence[Metric]
    rates: Mapping[str, float]
    """Learning rate that was chosen for an arm."""
    costs: Mapping[str, Sequence[Costs]]
    """By arm, of each run that is there: the sum of its trainings."""
    missing: Sequence[str]
    """Runs that are not there."""
    commands: Sequence[str]
    hardware: str


def summarize(
    asked: Comparison, base: Values, values: Mapping[str, Sequence[Values | None]], confidence: float
) -> list[Metric]:
    """The metrics in the order of the file.

    Args:
        asked: The comparison.
        base: Values of the model before any training.
        values: Arm to values on each seed; None for a run that is missing.
        confidence: Of the intervals.
    """
    return [
        Metric(
            name,
            asked.measures[measure].unit(metric),
            asked.measures[measure].better(metric),
            base.get(name),
            dict(_cells({arm: [(run or {}).get(name) for run in runs] for arm, runs in values.items()}, confidence)),
        )
        for name, measure, metric in _metrics(asked, [base, *(run for runs in values.values() for run in runs if run)])
    ]


def _metrics(asked: Comparison, found: Sequence[Values]) -> Iterator[tuple[str, str, str]]:
    """Each metric that some model has: its whole name, its measure and its own name."""
    names = list(dict.fromkeys(name for values in found for name in values))
    for measure in asked.measures:
        for name in names:
            if name == measure or name.startswith(f"{measure}/"):
                yield name, measure, name.removeprefix(measure).removeprefix("/")


def _cells(values: Mapping[str, Sequence[float | None]], confidence: float) -> Iterator[tuple[str, Cell]]:
    first = next(iter(values.values()))
    for i, (arm, own) in enumerate(values.items()):
        known = [value for value in own if value is not None]
        pairs = [(a, b) for a, b in zip(own, first, strict=True) if a is not None and b is not None] if i else []
        differences = [a - b for a, b in pairs]
        difference = seed_mean(differences, confidence) if len(pairs) > 1 else None
        mean = seed_mean(known, confidence) if known else None
        yield arm, Cell(tuple(own), mean, difference, seeds_needed(differences, confidence))
