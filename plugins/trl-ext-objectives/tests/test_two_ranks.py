"""Two ranks with a micro-batch each equal one rank that accumulates both, for every objective."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trl_ext.testing import save_model, tiny_llama, tiny_tokenizer

WORKER = Path(__file__).with_name("two_ranks.py")
OBJECTIVES = (
    *("nll", "power:alpha=linear:0.5:2", "log1mp", "focal", "huber:delta=0.997", "dft", "eaft:exponent=2", "deft"),
    *("talr", "entropy:beta=0.3", "idft", "chord-phi", "gem", "psft:refresh_every=2", "iw-sft:temperature=20"),
    *("rho1:reference=model:{other}", "asft:beta=0.5", "mixture:first=deft,second=iw-sft", "auto"),
    *("threshold:q=0.004,normalization=valid", "threshold:q=0.004,normalization=kept"),
)


def run(command: list[str], folder: Path, objectives: list[str]) -> dict[str, dict]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {k: v for k, v in environment.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, *command, str(WORKER), str(folder), *objectives],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / f"{2 if command else 1}.pt")


@pytest.mark.slow
def test_two_ranks_equal_one_with_both_micro_batches(tmp_path: Path) -> None:
    other = tiny_llama(hidden=16, layers=1, seed=5)
    with torch.no_grad():
        other.lm_head.weight.mul_(20)
    path = save_model(other, tiny_tokenizer(), tmp_path / "other")
    objectives = [objective.format(other=path) for objective in OBJECTIVES]
    alone = run([], tmp_path, objectives)
    both = run(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], tmp_path, objectives)
    for objective in objectives:
        one, two = alone[objective], both[objective]
        assert two["losses"] == pytest.approx(one["losses"], rel=2e-5), objective
        # fp32 gradients summed in another order, over three steps.
        assert (two["moved"] - one["moved"]).norm() / one["moved"].norm() < 1e-4, objective
        assert one["moved"].norm() > 1e-6, objective
