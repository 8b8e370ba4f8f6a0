"""The plugins on two ranks of torchrun over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import checksum_reward
from test_best_of_m import stop_at_the_first

WORKER = Path(__file__).parent / "two_ranks.py"


@pytest.mark.slow
def test_groups_over_ranks_and_a_failure_on_one(tmp_path: Path) -> None:
    """One group of four over two ranks of two: the update is plain GRPO's, the first correct draw that of all ranks.

    Two groups of four as one are TRL's group of eight. One rank's failure stops both.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(WORKER), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for found in ranks:
        assert found["moved"] > 1e-3
        # As on one rank: rounding, amplified by Adam's first steps.
        assert found["apart"] < 2e-5
        assert found["merged_apart"] < 2e-5
        assert sum(found["counted"]) == 8  # two steps of four completions, on whichever rank
        for name in ("message", "pair_message"):
            assert "failed in hook 'advantages' at step 1: LookupError: no verdict [on rank 1 of 2]" in found[name]
    assert ranks[0]["counted"] == ranks[1]["counted"]
    accepted = 0
    for (first, given), (second, given_there) in zip(*(found["best_of_m"] for found in ranks), strict=True):
        place, _ = stop_at_the_first([reward >= 0.8 for reward in checksum_reward([*first, *second])])
        assert [*given, *given_there] == [4.0 * (i == place) for i in range(4)]
        accepted += place is not None
    assert accepted
