"""`process-reward` on two ranks of torchrun over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "two_ranks.py"


@pytest.mark.slow
def test_groups_over_ranks_and_a_failure_on_one(tmp_path: Path) -> None:
    """One group of four over two ranks of two: the update is plain GRPO's; one rank's failure stops both."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(WORKER), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    counts = set()
    for rank in range(2):
        moved, apart, counted, message = (tmp_path / f"rank{rank}").read_text().splitlines()
        assert float(moved) > 1e-3
        # As on one rank: rounding, amplified by Adam's first steps.
        assert float(apart) < 2e-5
        counts.add(counted)
        assert sum(json.loads(counted)) == 8  # two steps of four completions, on whichever rank
        assert "failed in hook 'advantages' at step 1: LookupError: no verdict [on rank 1 of 2]" in message
    assert len(counts) == 1
