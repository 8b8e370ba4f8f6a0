"""`examples/reachability_grpo.py` and `reachability_queries.py`, in the least sizes that go through all of them."""

from __future__ import annotations

import importlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture
def grpo(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = importlib.import_module("reachability_grpo")
    sizes = {
        "letters": 5, "in_reach": (1, 2), "hidden": 16, "base_rows": 128, "base_steps": 60, "base_rate": 1e-2,
        "prompts": 16, "held_out": 6, "steps": 4, "batch_size": 16, "evaluate_every": 2, "probed": 4,
        "most_rollouts": 32,
    }  # fmt: skip
    monkeypatch.setattr(module, "LARGE", module.Setup(**sizes))
    return module


def test_hints_leave_the_rest_of_the_word(grpo: Any) -> None:
    whole, hinted = (grpo.problems(grpo.LARGE, left, 8, 0) for left in (5, 2))
    for a, b in zip(whole, hinted, strict=True):
        word = a["prompt"].removeprefix("copy ").removesuffix(":")
        assert (a["answer"], b["prompt"], b["answer"]) == (word, a["prompt"] + word[:3], word[3:])


def test_training_example_runs(grpo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a success outcome rewards change nothing; process rewards do; all arms start alike."""
    monkeypatch.setattr(sys, "argv", ["script", "--large", "--seeds", "1", "--output", str(tmp_path)])
    grpo.main()
    (result,) = json.loads((tmp_path / "results.json").read_text())["results"]
    curves = result["curves"]
    assert [point["step"] for point in curves["process"]] == [0, 2, 4]
    assert len({curve[0]["whole words"] for curve in curves.values()}) == 1
    first, *_, last = curves["outcome"]
    assert first["whole words"] < 1e-4
    assert last["whole words"] == first["whole words"]
    assert curves["process"][-1]["in reach"] != first["in reach"]
    assert "| process |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "training.png").stat().st_size > 10_000


def test_queries_example_runs(grpo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("reachability_queries")
    monkeypatch.setattr(module, "Setup", lambda: grpo.LARGE)
    monkeypatch.setattr(module, "Sizes", partial(module.Sizes, most_draws=64, rollouts=8))
    monkeypatch.setattr(sys, "argv", ["script", "--seeds", "1", "--output", str(tmp_path)])
    module.main()
    (result,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert all(query["alpha"] > 1 / 64 for query in result["queries"])
    assert "Brier score" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "queries.png").stat().st_size > 10_000
