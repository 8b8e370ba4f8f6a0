"""Ranges and choices of options: what they hold, how they read, and what misses them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pytest

from trl_ext.options import Range, check_options, violation

if TYPE_CHECKING:
    from torch import Tensor

Share = Annotated[float, Range(ge=0, le=1)]
Count = Annotated[int, Range(ge=1)]


@pytest.mark.parametrize(
    ("bounds", "text", "inside", "outside"),
    [
        (Range(gt=0), "> 0", [1e-300, 1, 1e300, 10**400], [0, -1]),
        (Range(ge=0), ">= 0", [0, 0.0, 3], [-1e-300]),
        (Range(lt=1), "< 1", [0, -1e300], [1, 1.5]),
        (Range(le=1), "<= 1", [1, -5], [1.0000001]),
        (Range(ge=0, lt=1), "in [0, 1)", [0, 0.999], [1, -0.1]),
        (Range(gt=0, le=1), "in (0, 1]", [1, 0.001], [0, 1.1]),
        (Range(gt=-0.5, lt=0.5), "in (-0.5, 0.5)", [0], [-0.5, 0.5]),
    ],
)
def test_a_range_holds_the_finite_numbers_within_its_bounds(bounds, text, inside, outside):
    assert str(bounds) == text
    assert [value in bounds for value in inside] == [True] * len(inside)
    assert not any(value in bounds for value in [*outside, math.nan, math.inf, -math.inf])


@pytest.mark.parametrize("bounds", [{}, {"gt": 0, "ge": 0}, {"lt": 0, "le": 1}])
def test_a_range_without_sense_is_refused(bounds):
    with pytest.raises(ValueError, match=r"at least one bound|two bounds on one side"):
        Range(**bounds)


@pytest.mark.parametrize(
    ("annotation", "fitting", "missing"),
    [
        (Share, [0, 0.5, 1], {2: "is not in [0, 1]", math.nan: "is not in [0, 1]"}),
        (Share | None, [None, 1.0], {-1: "is not in [0, 1]"}),
        (Literal["a", "b"], ["a"], {"c": "is not one of a, b", None: "is not one of a, b"}),
        (Literal[1, 2], [1], {True: "is not one of 1, 2"}),
        (Literal["auto"] | Count, ["auto", 3], {"other": "is not one of auto", 0: "is not >= 1"}),
        (Share | list[Share], [0.5, [0.5, 1]], {2.0: "is not in [0, 1]"}),
        (tuple[Share, Count], [(0.5, 7)], {(2, 7): "is not in [0, 1]", (0.5, 0): "is not >= 1"}),
        (tuple[Count, ...], [(), (1, 2)], {(1, 2, 0): "is not >= 1"}),
        (Sequence[Count], [[1], (1,)], {(0,): "is not >= 1"}),
        (str | Sequence[Literal["x"]], ["free", ("x",)], {("y",): "is not one of x"}),
        (Annotated[int, "steps", Range(ge=1), Range(le=9)], [1, 9], {0: "is not >= 1", 10: "is not <= 9"}),
        (float, [math.nan, -1], {}),
        (Any, ["x"], {}),
    ],
)
def test_values_are_held_to_what_their_annotation_declares(annotation, fitting, missing):
    assert [violation(value, annotation) for value in fitting] == [None] * len(fitting)
    assert {value: violation(value, annotation) for value in missing} == missing


@pytest.mark.parametrize("annotation", [dict[str, Share], Mapping[str, Share]])
def test_the_values_of_a_mapping_are_held_too(annotation):
    assert violation({"a": 0.5}, annotation) is None
    assert violation({"a": 0.5, "b": 2}, annotation) == "is not in [0, 1]"
    assert violation([{"a": 2}], list[annotation]) == "is not in [0, 1]"


@dataclass
class Base:
    share: Share = 0.5
    mode: Literal["soft", "hard"] = "soft"


@dataclass
class Plugin(Base):
    steps: list[Count] = field(default_factory=list)
    state: list[Tensor] = field(default_factory=list, init=False)
    helper: Tensor | None = None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.5}, "share=1.5 is not in [0, 1]"),
        ({"mode": "loud"}, "mode='loud' is not one of soft, hard"),
        ({"steps": [3, 0]}, "steps=[3, 0] is not >= 1"),
    ],
)
def test_the_options_of_an_instance_are_checked_with_those_it_inherits(options, message):
    check_options(Plugin())
    with pytest.raises(ValueError, match=re.escape(message)):
        check_options(Plugin(**options))


def test_what_is_no_dataclass_has_no_options_to_check():
    check_options(object())
