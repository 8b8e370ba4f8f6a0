"""What a reader of the code is told: each method opens with its formula, and each loss states what it is divided by."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

import pytest
from trl_ext_mixing.demonstrations import Demonstrations

METHODS = {
    point.name: point.load() for point in entry_points(group="trl_ext") if point.value.startswith("trl_ext_mixing.")
}
LOSS_HOOKS = ("per_token_loss", "policy_loss", "auxiliary_losses")
SOURCE = re.compile(r"arXiv:\d{4}\.\d{5}")


def losses() -> Iterator[tuple[str, Any]]:
    for name, method in METHODS.items():
        for hook in LOSS_HOOKS:
            if hook in vars(method):
                yield f"{name}.{hook}", vars(method)[hook]
    yield "Demonstrations.nll_sum", Demonstrations.nll_sum


@pytest.mark.parametrize("name", METHODS)
def test_a_method_opens_with_its_formula_and_source(name: str) -> None:
    doc = sys.modules[METHODS[name].__module__].__doc__
    assert doc is not None
    assert SOURCE.search(doc.splitlines()[0])
    formula = [line for line in doc.splitlines() if line.startswith("    ")]
    assert any("=" in line or "<-" in line for line in formula), "an indented formula"


@pytest.mark.parametrize(("name", "loss"), losses(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_loss_states_its_shape_its_denominator_and_its_formula(name: str, loss: Any) -> None:
    doc = " ".join((inspect.getdoc(loss) or "").split())
    assert re.match(r"Loss \([\w, ]*\)", doc), "the shape comes first"
    assert re.search(r"denominator is|divides it by", doc), "what it is divided by"
    assert "log p" in doc


def test_there_are_five_methods_and_two_losses() -> None:
    assert sorted(METHODS) == ["chord", "hpt", "parallel-averaging", "relift", "surgery"]
    assert [name for name, _ in losses()] == ["hpt.auxiliary_losses", "Demonstrations.nll_sum"]
