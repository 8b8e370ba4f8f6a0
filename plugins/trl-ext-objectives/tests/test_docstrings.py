"""What an author reads first: every method file opens with its formula and source, every loss says what it gives."""

from __future__ import annotations

import inspect
import re
import sys
from importlib import metadata

import pytest

OBJECTIVES = {
    entry.name: entry
    for entry in metadata.entry_points(group="trl_ext")
    if entry.dist is not None and entry.dist.name == "trl-ext-objectives"
}
SOURCE = re.compile(r"arXiv \d{4}\.\d{5}")
RANGE = re.compile(r"in [\[(]|at least|at most|nats|between the losses")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_opens_with_its_formula_and_every_loss_states_what_it_gives(name: str) -> None:
    objective = OBJECTIVES[name].load()
    assert SOURCE.search(objective.citation)
    assert not objective.__doc__.startswith(f"{objective.__name__}(")  # a dataclass's own makeshift
    module = sys.modules[objective.__module__].__doc__
    assert "`" in module.partition(".\n")[0], "the first sentence holds no formula"
    assert SOURCE.search(module)
    loss = inspect.getdoc(objective.per_token_loss)
    assert loss.startswith("Loss (B, T)")
    assert "denominator" in loss
    assert RANGE.search(loss), "neither a range nor a unit"
    assert SOURCE.search(loss)
