"""`examples/rl_excursions.py` in the least size: going on after an interruption, and its table."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = importlib.import_module("rl_excursions")
    least = {"hidden": 16, "checkpoints": (1, 2), "batch": 8, "problems": 8, "steps": 2, "held_out": 4}
    monkeypatch.setattr(module, "CPU", replace(module.CPU, **least))
    monkeypatch.setattr(module, "RECIPES", {k: module.RECIPES[k] for k in ("SFT, then RL", "parallel")})
    return module


def run(example: Any, monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", ["script", "--seeds", "1", "--output", str(folder), *arguments])
    threads = torch.get_num_threads()
    try:
        example.main()
    finally:
        torch.set_num_threads(threads)
    return example.results(folder / "cpu")


def test_an_interrupted_run_goes_on_to_the_same_results(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(example, monkeypatch, tmp_path / "whole")
    assert [(line["checkpoint"], line["recipe"]) for line in whole] == [
        (1, "SFT, then RL"), (1, "parallel"), (2, "SFT, then RL"), (2, "parallel"),
    ]  # fmt: skip

    measure, left = example.measure, [3]

    def killed(*arguments: Any) -> dict[str, float]:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(example, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        run(example, monkeypatch, tmp_path / "parts")
    assert "| 2 | SFT, then RL | 2 + 2 | 1 |" in (tmp_path / "parts/cpu/table.md").read_text()
    monkeypatch.setattr(example, "measure", measure)
    monkeypatch.setattr(example.Run, "pretraining", lambda run: pytest.fail("the checkpoints are on disk"))
    parts = run(example, monkeypatch, tmp_path / "parts")
    assert [line | {"seconds": 0} for line in parts] == [line | {"seconds": 0} for line in whole]
    assert (tmp_path / "parts/cpu/plot.png").stat().st_size > 10_000


def test_what_cannot_run_leaves_the_results_as_they_are(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A size for a GPU without one, and a folder of another size."""
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/results.jsonl").write_text("{}\n")
    (tmp_path / "cpu/size.json").write_text(json.dumps({"hidden": 1}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, message in ((["--gpu"], "no CUDA device"), ([], "results of another size")):
        with pytest.raises(SystemExit):
            run(example, monkeypatch, tmp_path, *arguments)
        assert message in capsys.readouterr().err
    assert (tmp_path / "cpu/results.jsonl").read_text() == "{}\n"


def test_differences_are_paired_by_seed(example: Any) -> None:
    lines = [
        {"seed": s, "checkpoint": 1, "recipe": recipe, "pass@1": p, "pass@8": p, "pass@32": p, "drift": 0.0}
        for s, recipe, p in [(0, "parallel", 0.5), (1, "parallel", 0.7), (1, "SFT, then RL", 0.6), (2, "parallel", 0.9)]
    ]
    lines[3] |= {"seed": 0, "recipe": "SFT, then RL"}
    written = example.table(lines, example.CPU)
    assert "| 1 | parallel | 2 + 2 | 2 | 60.0 ± 10.0 |" in written
    assert "| 1 | SFT, then RL | -15.0 ± 25.0 (-40.0, +10.0) |" in written
