"""Options that follow a schedule: the grammar, the values, and what is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_ext.options import Range
from trl_ext.schedules import Scheduled, parse_schedule, parse_schedules


@pytest.mark.parametrize(
    ("text", "values"),
    [
        (0.3, [0.3, 0.3, 0.3]),
        ("0.3", [0.3, 0.3, 0.3]),
        ("constant:0.3", [0.3, 0.3, 0.3]),
        ("linear:1:3", [1, 1.5, 3]),
        ("cosine:1:3", [1, 2 - math.sqrt(0.5), 3]),
        ("linear:3:1", [3, 2.5, 1]),
        ("linear:3:1:0.5", [3, 2, 1]),
        ("cosine:1:3:0.25", [1, 3, 3]),
    ],
)
def test_schedule_at_start_quarter_and_end(text: Any, values: list[float]) -> None:
    schedule = parse_schedule(text, "y", Range(gt=0))
    assert [schedule(t) for t in (0.0, 0.25, 1.0)] == pytest.approx(values)
    assert (schedule(-1), schedule(2)) == (schedule(0), schedule(1))  # the ends hold
    assert schedule.moves == (values[0] != values[2])


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.sampled_from(["linear", "cosine"]))
def test_schedule_stays_between_its_ends(start: float, end: float, progress: float, shape: str) -> None:
    value = parse_schedule(f"{shape}:{start!r}:{end!r}", "y", Range(ge=0, le=1))(progress)
    assert min(start, end) - 1e-12 <= value <= max(start, end) + 1e-12


@dataclass
class Scheduling:
    weight: Annotated[Scheduled, Range(ge=0, le=1)] = 0.5
    plain: Annotated[float, Range(ge=0)] = 1.0


def test_the_scheduled_options_of_a_plugin_are_found_by_their_annotation() -> None:
    schedules = parse_schedules(Scheduling("linear:0:1"))
    assert set(schedules) == {"weight"}
    assert schedules["weight"](0.25) == 0.25


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("linear:0:2", r"weight='linear:0:2': 2 is not in \[0, 1\]"),
        (1.5, r"weight=1.5: 1.5 is not in \[0, 1\]"),
        ("nan", "nan is not in"),
        ("linear:0:1:0", r"weight='linear:0:1:0': 0 is not in \(0, 1\]"),
        *(
            (bad, "weight=.* is not a number, constant:VALUE")
            for bad in ("linear:1", "step:1:2", "", None, True, [1.0])
        ),
    ],
)
def test_what_is_no_schedule_is_refused_with_the_option(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_schedules(Scheduling(value))
