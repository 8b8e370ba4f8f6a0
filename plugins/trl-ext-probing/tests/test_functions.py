"""Functions named by text: files that need to be found as modules, and files that fail."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from trl_ext_probing.functions import load_function

from trl_ext.errors import ConfigurationError

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
    reward = load_function(f"{tmp_path}/json.py:reward", "--reward")
    assert reward(["a", "b"]) == [3, 3]
    assert sys.modules[reward.__module__].reward is reward
    assert sys.modules["json"] is before


@pytest.mark.parametrize("error", ["LookupError('no table')", "SystemExit('no table')"])
def test_a_file_that_fails_leaves_no_module(tmp_path: Path, error: str) -> None:
    (tmp_path / "broken.py").write_text(f"raise {error}")
    before = set(sys.modules)
    with pytest.raises(ConfigurationError, match=r"broken.py:reward. cannot be loaded: \w+: no table"):
        load_function(f"{tmp_path}/broken.py:reward", "--reward")
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("package.module.name", "is not of the form module:function or file.py:function"),
        (":name", "is not of the form"),
        ("no.such:reward", "ModuleNotFoundError: No module named 'no'"),
        ("json:nothing", "has no attribute 'nothing'"),
        ("math:pi", "is a float and no function"),
        ("none.py:reward", "there is no file 'none.py'"),
    ],
)
def test_what_names_no_function_is_refused_in_one_line(reference: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^--metric {reference!r} .*{message}") as caught:
        load_function(reference, "--metric")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None, "so that the command line shows no traceback"
