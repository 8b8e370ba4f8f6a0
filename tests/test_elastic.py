"""A rank that is killed or asked to stop: what a launcher starts again ends where a run that was left alone does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import assert_equal_bits
from safetensors.torch import load_file
from workers import elastic

from trl_ext.checkpoints import newest_complete
from trl_ext.testing.ranks import on_ranks

pytestmark = pytest.mark.slow


def final(folder: Path) -> dict:
    return {
        f"{place}: {name}": tensor
        for place in (".", "raw")
        for name, tensor in load_file(folder / "final" / place / "model.safetensors").items()
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, Path]:
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("sft", "grpo")}
    for kind, folder in folders.items():
        assert on_ranks(elastic.main, folder, "none", kind) == [elastic.STEPS] * 2
    return folders


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_ranks_stop_at_one_step_when_one_of_them_gets_sigterm(tmp_path, undisturbed, kind):
    """The signal comes to rank 1 alone, and acts in the third step; both save after it, and a second run goes on."""
    assert on_ranks(elastic.main, tmp_path, "asked", kind) == [3, 3]
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert on_ranks(elastic.main, tmp_path, "asked", kind) == [elastic.STEPS] * 2
    assert_equal_bits(final(tmp_path), final(undisturbed[kind]))


def torchrun(*arguments: str, folder: Path, trouble: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [*command, elastic.__file__, str(folder), trouble],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_torchrun_starts_again_what_was_killed(tmp_path, undisturbed):
    """One rank is killed in the fourth step, whose last checkpoint is that of the second."""
    launcher = torchrun("--max-restarts", "1", folder=tmp_path, trouble="killed")
    _, errors = launcher.communicate(timeout=500)
    assert launcher.returncode == 0, errors[-4000:]
    assert (tmp_path / "happened").exists()
    assert_equal_bits(final(tmp_path), final(undisturbed["sft"]))


def test_without_restarts_the_killed_rank_ends_the_run_and_says_so(tmp_path):
    launcher = torchrun(folder=tmp_path, trouble="killed")
    _, errors = launcher.communicate(timeout=500)
    assert launcher.returncode != 0
    assert "Signal 9 (SIGKILL)" in errors
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]


def test_sigterm_to_torchrun_reaches_its_ranks_and_leaves_a_checkpoint(tmp_path, undisturbed):
    """Of a run that saves every second step, whichever step it is in; another launch goes on from there."""
    run = tmp_path / "run"
    launcher = torchrun(folder=tmp_path, trouble="slow")
    while launcher.poll() is None and not (run / "checkpoint-2" / "trl_ext" / "manifest.json").exists():
        time.sleep(0.2)
    launcher.send_signal(signal.SIGTERM)
    _, errors = launcher.communicate(timeout=500)
    newest, damaged = newest_complete(run)
    assert newest is not None, errors[-4000:]
    assert newest.name in ("checkpoint-3", "checkpoint-4", "checkpoint-5"), errors[-4000:]
    assert not damaged
    assert on_ranks(elastic.main, tmp_path, "none") == [elastic.STEPS] * 2
    assert_equal_bits(final(tmp_path), final(undisturbed["sft"]))
