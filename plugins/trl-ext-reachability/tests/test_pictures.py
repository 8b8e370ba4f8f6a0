"""Measurements end with everything but the pictures where matplotlib is not installed."""

from __future__ import annotations

import pytest
from trl_ext_reachability.pictures import if_matplotlib


def test_only_a_missing_matplotlib_is_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    drawn = []
    with if_matplotlib():
        drawn.append("picture")
    assert drawn == ["picture"]
    assert capsys.readouterr().out == ""
    with if_matplotlib():
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
    assert "no picture: matplotlib is not installed" in capsys.readouterr().out
    with pytest.raises(ModuleNotFoundError, match="PIL"), if_matplotlib():
        raise ModuleNotFoundError("No module named 'PIL'", name="PIL")
