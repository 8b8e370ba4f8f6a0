"""Averages on two real ranks: of FSDP2 shards against shards of the averages, and whole runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def on_ranks(number: int, worker: str, *arguments: object) -> None:
    script = Path(__file__).with_name(worker)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}", str(script)]
    done = subprocess.run(
        [*command, *map(str, arguments)], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-6000:]


def test_the_average_of_shards_is_the_shard_of_the_average():
    on_ranks(2, "fsdp_worker.py")


def test_any_number_of_ranks_takes_over_the_average_of_shards(tmp_path):
    on_ranks(2, "resharding_worker.py", "save", tmp_path)
    on_ranks(3, "resharding_worker.py", "load", tmp_path)


@pytest.mark.slow
def test_what_is_sharded_becomes_whole_and_the_reverse(tmp_path):
    for savers, loaders in ((2, 1), (1, 2)):
        folder = tmp_path / f"of-{savers}"
        folder.mkdir()
        on_ranks(savers, "resharding_worker.py", "save", folder)
        on_ranks(loaders, "resharding_worker.py", "load", folder)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp2", "fsdp2-accelerate"])
def test_a_run_on_two_ranks_saves_the_average_of_its_raw_weights(tmp_path, sharding):
    on_ranks(2, "ranks_worker.py", sharding, tmp_path)
