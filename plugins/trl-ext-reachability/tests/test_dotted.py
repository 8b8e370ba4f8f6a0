"""Functions named by text: files that need to be found as modules, and files that fail."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from trl_ext_reachability.dotted import load_function

SOURCE = """
from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar

@dataclass
class Case:
    kind: ClassVar[str] = "case"
    value: int = 3

def reward(completions, **columns):
    return [Case().value for _ in completions]
"""


def test_a_file_may_hold_dataclasses_with_postponed_annotations(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text(SOURCE)
    before = sys.modules["json"]
    reward = load_function(f"{tmp_path}/json.py:reward")
    assert reward(["a", "b"]) == [3, 3]
    assert sys.modules[reward.__module__].reward is reward
    assert sys.modules["json"] is before


def test_a_file_that_fails_leaves_no_module(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise LookupError('no table')")
    with pytest.raises(LookupError, match="no table"):
        load_function(f"{tmp_path}/broken.py:reward")
    assert not [name for name in sys.modules if name.startswith("broken")]
