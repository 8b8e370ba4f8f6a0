"""A rank that is killed or asked to stop: what a launcher starts again ends where a run that was left alone does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import assert_equal_bits
from safetensors.torch import load_file
from workers import elastic

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


def torchrun(*arguments: str, folder: Path, trouble: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*command, elastic.__file__, str(folder), trouble], env=environment, capture_output=True, text=True, timeout=500
    )


def test_torchrun_starts_again_what_was_killed(tmp_path, undisturbed):
    """One rank is killed in the fourth step, whose last checkpoint is that of the second."""
    done = torchrun("--max-restarts", "1", folder=tmp_path, trouble="killed")
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "happened").exists()
    assert_equal_bits(final(tmp_path), final(undisturbed["sft"]))


def test_without_restarts_the_killed_rank_ends_the_run_and_says_so(tmp_path):
    done = torchrun(folder=tmp_path, trouble="killed")
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
