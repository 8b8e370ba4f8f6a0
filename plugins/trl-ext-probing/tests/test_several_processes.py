"""Probes under torchrun: processes share the work, judge once, and find what one finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from interruption import lines_of, results_of
from trl_ext_probing import commands

from trl_ext.testing import ModularChain, save_model, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


def launch(*arguments: str) -> str:
    """What two processes print, of a module or a file."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*torchrun, *arguments], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def only_in_the_first(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """A judge that another process may not ask: its verdicts could differ, and with them what comes next."""
    assert os.environ.get("RANK", "0") == "0"
    return [float(len(c) % 3 == int(a) % 3) for c, a in zip(completions, answer, strict=True)]


def test_scores_are_made_in_parts_and_judged_once() -> None:
    printed = launch(str(HERE / "scoring_worker.py"))
    assert sorted(printed.splitlines()) == ["process 0 is content", "process 1 is content"]


def test_reachability_is_the_one_of_one_process(tmp_path: Path) -> None:
    rows = [{**row, "answer": str(i)} for i, row in enumerate(ModularChain(steps=2).dataset(7))]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options: dict[str, Any] = {
        "model": save_model(tiny_llama(hidden=16), tiny_tokenizer(), tmp_path / "model"),
        "dataset": str(tmp_path / "data.jsonl"),
        "reward": "test_several_processes:only_in_the_first",
        "n": 4,
        "max_rollouts": 8,
        "max_completion_length": 6,
        "batch_size": 2,
        "device": "cpu",
    }
    commands.reachability(**options, output=tmp_path / "one")
    words = [w for name, value in options.items() for w in (f"--{name.replace('_', '-')}", str(value))]
    launch("-m", "--", "trl_ext", "probe", "reachability", *words, "--output", str(tmp_path / "two"))
    one, two = (next((tmp_path / name).glob("journal*")) for name in ("one", "two"))
    samples, demonstrations = [], []
    for journal in (one, two):
        lines = lines_of(journal)
        samples.append(sorted(str(line) for line in lines if "sample" in line))
        shown = sorted((line for line in lines if "demonstration" in line), key=lambda line: line["demonstration"])
        demonstrations.append([line.pop("log_likelihood") for line in shown])
        assert [line["demonstration"] for line in shown] == list(range(7))
    assert samples[0] == samples[1]
    assert demonstrations[1] == pytest.approx(demonstrations[0], rel=1e-5)  # float32 in other batches
    routes = [results_of(tmp_path / name)["models"][0]["routes"] for name in ("one", "two")]
    assert routes[0] == routes[1]
