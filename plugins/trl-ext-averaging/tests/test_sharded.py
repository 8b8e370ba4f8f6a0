"""Averages on two real ranks: of FSDP2 shards against shards of the averages, and whole runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def on_two_ranks(worker: str, *arguments: object) -> None:
    script = Path(__file__).with_name(worker)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(
        [*command, *map(str, arguments)], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-6000:]


def test_the_average_of_shards_is_the_shard_of_the_average():
    on_two_ranks("fsdp_worker.py")


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp2", "fsdp2-accelerate"])
def test_a_run_on_two_ranks_saves_the_average_of_its_raw_weights(tmp_path, sharding):
    on_two_ranks("ranks_worker.py", sharding, tmp_path)
