"""Two gloo ranks: one choice over both, equal to one rank's with the same samples; FSDP2; failures on one of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import CASES, EXACT, FAULTS, SHARDED, run
from training import parameters

pytestmark = pytest.mark.slow  # some 40 trainings
LIMIT = 400  # seconds; a hang ends in gloo's own timeout of 60 s long before


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    """What each rank saved."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).parent / "ranks.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_choose_as_one_does(case, on_two_ranks):
    one = parameters(run(case, 1))
    for name, value in one.items():
        # fp32 in another order of summation; the derivative is rounded more, but chooses alike
        torch.testing.assert_close(
            on_two_ranks[0][case][name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", ["everything", "everything micro"])
def test_keeping_all_samples_is_plain_trl_to_the_bit_on_two_ranks(case, on_two_ranks):
    assert set(EXACT) >= {"plain", case}
    for name, value in on_two_ranks[0]["plain"].items():
        assert torch.equal(on_two_ranks[0][case][name], value), name


def test_a_rollout_filter_that_drops_nothing_is_plain_trl_on_two_ranks(on_two_ranks):
    for name, value in on_two_ranks[0]["grpo plain"].items():
        assert torch.equal(on_two_ranks[0]["grpo"][name], value), name
    assert all(torch.isfinite(value).all() for value in on_two_ranks[0]["grpo filter"].values())


# -- FSDP2 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SHARDED)
def test_under_fsdp2_training_is_that_of_ddp(case, on_two_ranks):
    """No rank holds whole weights or a whole t, and the parameters after three steps are those of DDP."""
    sharded, whole = on_two_ranks[0][f"fsdp2 {case}"], on_two_ranks[0][f"ddp {case}"]
    assert sharded["sharded"]
    assert not whole["sharded"]
    for name, value in whole["parameters"].items():
        torch.testing.assert_close(
            sharded["parameters"][name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    for mine, theirs in zip(sharded["scores"], whole["scores"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    compared = set()
    for mine, theirs in zip(sharded["logs"], whole["logs"], strict=True):
        for key in theirs:
            if key.startswith(("Watched/", "gradient-surgery/", "loss", "grad_norm")):
                assert mine[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-3), key
                compared.add(key)
    assert compared & {"Watched/update_cosine", "gradient-surgery/cosine"}


# -- two ranks fail as one -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", FAULTS)
def test_a_failure_before_an_exchange_on_one_rank_stops_both(hook, on_two_ranks):
    for rank in range(2):
        error = on_two_ranks[rank][f"fault in {hook}"]["error"]
        assert f"failed in hook '{hook}' at step" in error
        assert "ArithmeticError: only here" in error
        assert error.endswith("[on rank 1 of 2]")


# -- resume ----------------------------------------------------------------------------------------------------------


def test_each_ranks_counts_go_on_after_a_resume(on_two_ranks):
    first, second = on_two_ranks[0]["resumed"]
    assert {*first} == {f"{what}-0000{rank}.csv" for what in ("kept", "samples") for rank in range(2)}
    assert first["samples-00000.csv"] != first["samples-00001.csv"]
    assert second == first
