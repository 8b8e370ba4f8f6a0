"""How near each test comes to its tolerance, as a plugin of pytest: `make margins`, or `pytest -p margins` from here.

Looks into `torch.testing.assert_close`, `torch.allclose`, `torch.isclose` and `pytest.approx`, and prints for each test
its tightest comparison that passed: the error, what it was allowed, and their ratio. A ratio above 1/4 may fail on
another processor. Not seen: a bare `abs(a - b) < c`, and what a test runs in another process.

`--shuffle N` runs the tests in another order, and `--other-seeds N` adds N to every seed that torch is given.
"""

from __future__ import annotations

import functools
import math
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

NARROW = 0.25
_tightest: tuple[float, float, float, str] = (0.0, 0.0, 0.0, "")
"""Ratio, error, tolerance and line of the tightest comparison in the current test."""
_margins: dict[str, tuple[float, float, float, str]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("margins")
    group.addoption("--shuffle", type=int, metavar="N", help="run the tests in the random order of this seed")
    group.addoption("--other-seeds", type=int, metavar="N", help="add N to every seed that torch is given")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.shuffle is not None:
        # Files, and tests within each: what a file's tests share is made once. The same order in every worker of xdist.
        chance = random.Random(config.option.shuffle)
        place = {path: chance.random() for path in sorted({item.path for item in items})}
        items.sort(key=lambda item: (place[item.path], chance.random()))


def pytest_configure(config: pytest.Config) -> None:
    if config.option.other_seeds is not None:
        _add_to_seeds(config.option.other_seeds)
    for name in ("isclose", "allclose"):
        setattr(torch, name, _observed(getattr(torch, name)))
    scalar: Any = type(pytest.approx(0.0))
    equal = scalar.__eq__

    def approximately(self: Any, actual: Any) -> bool:
        passed = equal(self, actual)
        numbers = isinstance(actual, int | float) and isinstance(self.expected, int | float)
        if passed and numbers and math.isfinite(actual):
            _note(abs(actual - self.expected), self.tolerance)
        return passed

    scalar.__eq__ = approximately


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    global _tightest
    _tightest = (0.0, 0.0, 0.0, "")
    yield
    item.user_properties.append(("margin", _tightest))  # with the report it also comes from a worker of xdist


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    margin = dict(report.user_properties).get("margin")
    if report.when == "call" and margin is not None and margin[0]:  # type: ignore[index]
        _margins[report.nodeid] = margin  # type: ignore[assignment]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section("margins")
    terminalreporter.line(f"{'ratio':>7}  {'error':>9}  {'allowed':>9}  line and test")
    for test, (ratio, error, tolerance, line) in sorted(_margins.items(), key=lambda entry: -entry[1][0]):
        terminalreporter.line(f"{ratio:7.3f}  {error:9.2e}  {tolerance:9.2e}  {line}  {test}")
    narrow = sum(margin[0] > NARROW for margin in _margins.values())
    terminalreporter.line(f"{narrow} of {len(_margins)} tests come within a factor of {1 / NARROW:.0f} of failing")


def _add_to_seeds(number: int) -> None:
    seed = torch.manual_seed

    class Generator(torch.Generator):
        def manual_seed(self, seed: int) -> torch.Generator:
            return super().manual_seed(seed + number)

    torch.manual_seed = lambda given: seed(int(given) + number)
    torch.Generator = Generator  # type: ignore[misc]


def _observed(close: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.isclose` or `torch.allclose`, noting the element nearest to its tolerance where a test calls it."""

    @functools.wraps(close)
    def observed(input: Tensor, other: Tensor, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> Any:
        result = close(input, other, rtol=rtol, atol=atol, equal_nan=equal_nan)
        caller = Path(sys._getframe(1).f_code.co_filename).parts
        if {"tests", "testing"}.intersection(caller) and bool(torch.as_tensor(result).all()):
            _note_elements(input, other, rtol, atol)
        return result

    return observed


def _note_elements(input: Tensor, other: Tensor, rtol: float, atol: float) -> None:
    a, b = torch.broadcast_tensors(input.detach().double(), other.detach().double())
    finite = a.isfinite() & b.isfinite()
    errors, allowed = (a - b).abs()[finite], (atol + rtol * b.abs())[finite]
    if errors.numel():
        worst = int(torch.where(errors > 0, errors / allowed, 0).argmax())
        _note(float(errors[worst]), float(allowed[worst]))


def _note(error: float, tolerance: float) -> None:
    global _tightest
    if error and error / tolerance > _tightest[0]:
        # Numbers of numpy do not pass from a worker of xdist to the reporting process.
        _tightest = (float(error / tolerance), float(error), float(tolerance), _line_of_test())


def _line_of_test() -> str:
    """The innermost line of a test module that is being executed."""
    frame: Any = sys._getframe()
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.name.startswith("test_"):
            return f"{file.name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
