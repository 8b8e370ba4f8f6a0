"""Parallel averaging on two ranks over gloo: DDP against the plain branches, FSDP2 against DDP."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from branches import largest_difference, two_branches
from mixing_runs import Recorder

pytestmark = pytest.mark.slow


def launch(folder: Path, sharding: str) -> list[dict[str, Any]]:
    """What each rank saw."""
    folder.mkdir()
    script = Path(__file__).with_name("two_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*command, str(script), str(folder), sharding],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch(tmp_path_factory.mktemp("two") / "ddp", "ddp")


def test_ddp_ranks_take_the_mean_of_two_branches_on_the_reduced_gradients(ddp: list[dict[str, Any]]) -> None:
    for rank in ddp:
        seen = Recorder(rank["rl"], rank["sft"], rank["weights"])
        expected = two_branches("adamw_torch", seen, 4, (1e-2, 1e-2), (0.2, 0.2))
        assert largest_difference(seen.weights[-1], expected[-1]) == 0
    assert largest_difference(ddp[0]["weights"][-1], ddp[1]["weights"][-1]) == 0
    assert largest_difference(ddp[0]["weights"][0], ddp[0]["weights"][-1]) > 1e-2


def test_fsdp2_equals_ddp(ddp: list[dict[str, Any]], tmp_path: Path) -> None:
    shards = launch(tmp_path / "fsdp2", "fsdp2")
    whole = [torch.cat(parts) for parts in zip(shards[0]["weights"][-1], shards[1]["weights"][-1], strict=True)]
    # fp32 reductions in another order; Adam divides near-zero gradients by their own size, so a few weights may part
    # by a share of the learning rate of 1e-2.
    assert largest_difference(whole, ddp[0]["weights"][-1]) < 1e-4
    names = ("grad_norm_sft", "update_norm_rl", "update_norm_sft", "update_cosine", "update_sign_conflicts")
    for mine, theirs in zip(shards[0]["logs"], ddp[0]["logs"], strict=True):
        for name in names:
            key = f"parallel-averaging/{name}"
            assert mine[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-4), name
