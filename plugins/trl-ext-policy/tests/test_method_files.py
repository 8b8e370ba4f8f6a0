"""Each method is a short file that opens with its formula and source, and says what shapes and denominators are."""

from __future__ import annotations

import inspect
import re
import sys
from importlib.metadata import entry_points
from typing import Any

import pytest

METHODS = {
    point.name: point.load() for point in entry_points(group="trl_ext") if point.value.startswith("trl_ext_policy.")
}
PAPERS = {
    "clip-cov": "2505.22617",
    "entropy-advantage": "2506.14758",
    "entropy-reward": "2508.04349",
    "gfpo": "2508.09726",
    "gtpo": "2508.03772",
    "kl-cov": "2505.22617",
    "pass-at-k": "2508.10751",
    "pkpo": "2505.15201",
}


def test_these_are_the_methods() -> None:
    assert METHODS.keys() == PAPERS.keys()


@pytest.mark.parametrize("name", METHODS)
def test_a_method_opens_with_its_formula_and_source_and_is_short(name: str) -> None:
    module: Any = sys.modules[METHODS[name].__module__]
    assert module.__name__.rpartition(".")[2] == name.replace("-", "_")
    assert module.__doc__.startswith(f"`{name}`: ")
    assert f"arXiv {PAPERS[name]}" in module.__doc__
    assert f"arXiv {PAPERS[name]}" in METHODS[name].citation
    assert any(re.match(r" {4}.*(=|<-)", line) for line in module.__doc__.splitlines()), "an indented formula"
    assert len(inspect.getsource(module).splitlines()) < 100


@pytest.mark.parametrize("name", METHODS)
def test_advantages_and_losses_state_shape_and_denominator(name: str) -> None:
    method = METHODS[name]
    if hasattr(method, "advantages"):
        assert re.match(r"\(N(, T)?,?\) float", method.advantages.__doc__)
    else:
        assert method.policy_loss.__doc__.startswith("Loss (B, T)")
        assert "denominator" in method.policy_loss.__doc__
