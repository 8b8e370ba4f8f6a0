"""Two gloo ranks: one choice over both, equal to one rank's with the same samples."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import CASES, EXACT, GRPO, run
from training import parameters

pytestmark = pytest.mark.slow  # some 20 trainings


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    """Parameters by case after training on two ranks."""
    out = tmp_path_factory.mktemp("ranks") / "out.pt"
    script = Path(__file__).parent / "ranks.py"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = ",".join((*CASES, *EXACT, *GRPO))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        f"--master_port={port}",
        str(script),
        names,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, str(out)], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return torch.load(out)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_choose_as_one_does(case, on_two_ranks):
    one = parameters(run(case, 1))
    for name, value in one.items():
        # fp32 in another order of summation; the derivative is rounded more, but chooses alike
        torch.testing.assert_close(
            on_two_ranks[case][name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", ["everything", "everything micro"])
def test_keeping_all_samples_is_plain_trl_to_the_bit_on_two_ranks(case, on_two_ranks):
    for name, value in on_two_ranks["plain"].items():
        assert torch.equal(on_two_ranks[case][name], value), name


def test_a_rollout_filter_that_drops_nothing_is_plain_trl_on_two_ranks(on_two_ranks):
    for name, value in on_two_ranks["grpo plain"].items():
        assert torch.equal(on_two_ranks["grpo"][name], value), name
    assert all(torch.isfinite(value).all() for value in on_two_ranks["grpo filter"].values())
