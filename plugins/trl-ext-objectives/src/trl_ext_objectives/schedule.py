"""Ranges of options, and options that follow a schedule over the training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Shape = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Range:
    """An interval of finite numbers, for checks and their messages."""

    low: float
    high: float = math.inf
    open_low: bool = False

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        return (self.low < value if self.open_low else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"a finite number {'greater than' if self.open_low else 'of at least'} {self.low:g}"
        return f"in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}]"


POSITIVE = Range(0, open_low=True)
NON_NEGATIVE = Range(0)
UNIT = Range(0, 1)


@dataclass(frozen=True)
class Schedule:
    """A value over the progress of the training, from `start` at 0 to `end` at 1."""

    shape: Shape
    start: float
    end: float

    @property
    def moves(self) -> bool:
        return self.start != self.end

    def __call__(self, progress: float) -> float:
        """The value after the share `progress`, in [0, 1], of the optimiser steps."""
        if self.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.start + (self.end - self.start) * progress


def parse_schedule(value: float | str, option: str, allowed: Range) -> Schedule:
    """Read a number, `constant:VALUE`, `linear:START:END` or `cosine:START:END`.

    Args:
        value: what the user wrote.
        option: plugin and option for messages, `power: alpha`.
        allowed: where every value has to lie; both shapes are monotone, so the ends decide.

    Raises:
        ValueError: naming the option and the allowed range.
    """
    if isinstance(value, str):
        shape, *texts = value.split(":")
        try:
            numbers = [float(text) for text in texts] if texts else [float(shape)]
        except ValueError:
            numbers = []
        if not texts:
            shape = "constant"
        if shape not in get_args(Shape) or len(numbers) != (1 if shape == "constant" else 2):
            raise ValueError(
                f"{option}={value!r} is neither a number nor constant:VALUE, linear:START:END or cosine:START:END"
            )
        schedule = Schedule(shape, numbers[0], numbers[-1])  # type: ignore[arg-type]
    else:
        schedule = Schedule("constant", value, value)
    for end in (schedule.start, schedule.end):
        if end not in allowed:
            raise ValueError(f"{option}={value!r}: the value must be {allowed}")
    return schedule
