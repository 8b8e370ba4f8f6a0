"""Options whose value follows a schedule over the training, such as `linear:0.1:1`.

An option is declared as `Annotated[Scheduled, Range(gt=0)]`: a number, or the text of a schedule. `parse_schedules`
reads all of a plugin's in its `__post_init__`, and a schedule is called with the progress of the training.
"""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, get_args

from trl_ext.options import Range, option_fields, option_type

Scheduled: TypeAlias = float | str
Shape = Literal["constant", "linear", "cosine"]

GRAMMAR = "a number, constant:VALUE, linear:START:END[:UNTIL] or cosine:START:END[:UNTIL]"


@dataclass(frozen=True)
class Schedule:
    """A value that goes from `start` to `end` while the training goes from its beginning to the share `until`."""

    shape: Shape
    start: float
    end: float
    until: float = 1.0
    """Share of the training, in (0, 1], after which the value stays at `end`."""

    @property
    def moves(self) -> bool:
        """Whether the value changes at all."""
        return self.start != self.end

    def __call__(self, progress: float) -> float:
        """The value after the share `progress` of the optimiser steps; the ends hold outside of [0, `until`].

        With s = progress / until: `start + (end - start) s` where the shape is linear, and
        `start + (end - start) (1 - cos(pi s)) / 2` where it is cosine.
        """
        share = min(max(progress / self.until, 0.0), 1.0)
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.start + (self.end - self.start) * share


def parse_schedule(value: Scheduled, option: str, allowed: Range) -> Schedule:
    """Read a number, `constant:VALUE`, `linear:START:END[:UNTIL]` or `cosine:START:END[:UNTIL]`.

    Args:
        value: What the user wrote.
        option: Name of the option, for messages.
        allowed: Where every value has to lie; all shapes are monotone, so the ends decide.

    Raises:
        ValueError: Names the option, and the grammar or the range.
    """
    shape, numbers = _split(value) if isinstance(value, str) else ("constant", [value])
    expected = {"constant": (1,), "linear": (2, 3), "cosine": (2, 3)}.get(shape, ())
    if len(numbers) not in expected or not all(_is_number(number) for number in numbers):
        raise ValueError(f"{option}={value!r} is not {GRAMMAR}")
    start, end, until = [*(numbers * 2 if shape == "constant" else numbers), 1.0][:3]
    for number, bounds in ((start, allowed), (end, allowed), (until, Range(gt=0, le=1))):
        if number not in bounds:
            raise ValueError(f"{option}={value!r}: {number:g} is not {bounds}")
    return Schedule(typing.cast(Shape, shape), start, end, until)


def parse_schedules(plugin: Any) -> dict[str, Schedule]:
    """The schedule of each option that a plugin declares as `Annotated[Scheduled, Range(...)]`.

    Raises:
        ValueError: An option is not a schedule, or leaves its range.
    """
    declared = {option: _bounds(option_type(type(plugin), option)) for option in option_fields(type(plugin))}
    return {
        option: parse_schedule(getattr(plugin, option), option, bounds)
        for option, bounds in declared.items()
        if bounds is not None
    }


def _bounds(annotation: Any) -> Range | None:
    """The range of a scheduled option; None where the option is of another type."""
    if typing.get_origin(annotation) is not Annotated or get_args(annotation)[0] != Scheduled:
        return None
    return next(mark for mark in get_args(annotation)[1:] if isinstance(mark, Range))


def _split(text: str) -> tuple[str, list[Any]]:
    shape, *texts = text.split(":")
    try:
        return (shape, [float(part) for part in texts]) if texts else ("constant", [float(shape)])
    except ValueError:
        return shape, []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
