"""The benchmarks of `benchmarks/gpu.sh` run, on a tiny model, and their figures come together in one file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PARTS = {"core", "objectives", "averaging", "data_regularization", "mixing"}


def joined(output: Path, parts: Path) -> subprocess.CompletedProcess[str]:
    script = str(BENCHMARKS / "joined.py")
    return subprocess.run([sys.executable, script, str(output), str(parts)], capture_output=True, text=True)


def part(**ratios: float) -> str:
    """What a benchmark writes of one arm, `asft, start`."""
    values = {over: {"median": value, "low": value - 0.01, "high": value + 0.01} for over, value in ratios.items()}
    facts = {"machine": "a machine", "versions": {"torch": "2"}, "commit": "abc", "device": "cpu"}
    return json.dumps({**facts, "shape": {}, "arms": {"asft, start": {"ms": 1.0, "ratios": values}}})


def test_parts_come_together_with_what_they_are_to_reach(tmp_path: Path) -> None:
    (tmp_path / "objectives.json").write_text(part(plain=1.2))
    done = joined(tmp_path / "all", tmp_path)
    assert done.returncode == 0
    assert "| objectives | asft, start | plain | 1.25 | 1.200 [1.190, 1.210] |" in done.stdout
    assert "| objectives | power | plain | 1.01 | not measured |" in done.stdout
    found = json.loads((tmp_path / "all").read_text())
    assert (found["machine"], found["commit"], found["failed"]) == ("a machine", "abc", {})
    assert found["parts"]["objectives"]["arms"]["asft, start"]["ms"] == 1.0


def test_a_part_that_failed_is_named_and_the_others_are_kept(tmp_path: Path) -> None:
    (tmp_path / "objectives.json").write_text(part(plain=1.2))
    (tmp_path / "mixing.failed").write_text("ended with status 124\n")
    done = joined(tmp_path / "all", tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip() == "mixing ended with status 124"
    assert set(json.loads((tmp_path / "all").read_text())["parts"]) == {"objectives"}


@pytest.mark.slow
@pytest.mark.timeout(3600)  # five processes, on a machine that may do other things too
def test_all_benchmarks_of_a_gpu_run_on_a_tiny_model(tmp_path: Path) -> None:
    output = tmp_path / "all.json"
    command = ["bash", str(BENCHMARKS / "gpu.sh"), str(output), "--size", "tiny"]
    done = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found: dict[str, Any] = json.loads(output.read_text())
    assert set(found["parts"]) == PARTS
    assert {"torch", "trl", "trl-ext"} <= found["versions"].keys()
    for row in found["reached"]:
        assert row["measured"]["median"] > 0, row
    for name, figures in found["parts"].items():
        assert all({"peak_mib", "copies"} & arm.keys() for arm in figures["arms"].values()), name
