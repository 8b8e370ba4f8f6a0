"""Each method file opens with its formula and source; each advantage and loss states its shape and denominator."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from typing import Any

import pytest

METHODS = sorted(
    (point for point in entry_points(group="trl_ext") if point.value.startswith("trl_ext_reachability.")),
    key=lambda point: point.name,
)


def source(method: Any) -> str:
    return sys.modules[method.__module__].__doc__ or ""


@pytest.mark.parametrize("point", METHODS, ids=lambda point: point.name)
def test_a_method_file_opens_with_formula_and_source(point: Any) -> None:
    method = point.load()
    assert method.__module__.rpartition(".")[2] == point.name.replace("-", "_")
    text = source(method)
    assert text.startswith(f"`{point.name}`: ")
    assert "arXiv 2603.06957" in text
    formulas = [line for line in text.splitlines() if line.startswith("    ")]
    assert any("|g|" in line or "log p" in line or "A_i" in line for line in formulas), text


@pytest.mark.parametrize("point", METHODS, ids=lambda point: point.name)
def test_advantages_and_losses_state_shape_and_denominator(point: Any) -> None:
    method = point.load()
    if hasattr(method, "advantages"):
        assert "(N,) float" in method.advantages.__doc__ or "(N, T) float" in method.advantages.__doc__
    if hasattr(method, "policy_loss"):
        assert "(B, T)" in method.policy_loss.__doc__
        assert "denominator" in method.policy_loss.__doc__


def test_there_are_methods_to_look_at() -> None:
    assert [point.name for point in METHODS] == ["adaptive-lr", "best-of-m", "pg", "process-reward", "reachability"]
