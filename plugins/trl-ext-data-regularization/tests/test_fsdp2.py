"""FSDP2 on real ranks over gloo: what is chosen and trained on shards is what DDP chooses and trains on copies."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from sharded_worker import CASES, COUNTING, FAULTS, LAYERWISE, continued, fault, main, parts, rollouts

from trl_ext.testing.ranks import on_ranks

pytestmark = pytest.mark.slow  # two trainings a case


@cache
def found(case):
    """What each of two ranks found, in shards and in copies."""
    with TemporaryDirectory() as folder:
        return on_ranks(main, Path(folder), case)


def assert_same_state(mine, theirs, but=()):
    assert mine.keys() == theirs.keys()
    for key in mine.keys() - set(but):
        if isinstance(theirs[key], torch.Tensor):
            torch.testing.assert_close(mine[key], theirs[key], rtol=0, atol=0)
        else:
            assert mine[key] == theirs[key]


@pytest.mark.parametrize("case", CASES)
def test_training_is_that_of_ddp(case):
    """fp32 in another order: what is summed over ranks, or over parts of a gradient, and then tens of operations."""
    sharded, whole = found(case)[0][True], found(case)[0][False]
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
    assert compared & {"Watched/update_cosine", "Watched/cosine", "gradient-surgery/cosine"}


@pytest.mark.parametrize("case", LAYERWISE)
def test_each_rank_keeps_the_samples_that_it_keeps_under_ddp(case):
    """Which samples, to the last one; the weights of Euclidean rules follow their Gram matrices' rounding."""
    layers = []
    for rank in found(case):
        sharded, whole = rank[True]["weights"], rank[False]["weights"]
        assert len(sharded) == len(whole) == 3
        for mine, theirs in zip(sharded, whole, strict=True):
            assert torch.equal(mine != 0, theirs != 0)
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
            layers.append(theirs)
    if LAYERWISE[case][1].get("scope") != "global":
        assert any((weights != weights[:1]).any() for weights in layers), "layers must choose apart"


def test_the_same_completions_are_dropped_as_under_ddp(tmp_path):
    dropped = 0
    for rank in on_ranks(rollouts, tmp_path):
        sharded, whole = rank[True], rank[False]
        assert sharded["sharded"]
        assert torch.equal(sharded["advantages"] != 0, whole["advantages"] != 0)
        torch.testing.assert_close(sharded["advantages"], whole["advantages"], rtol=1e-4, atol=1e-5)
        for name, value in whole["parameters"].items():
            torch.testing.assert_close(sharded["parameters"][name], value, rtol=1e-4, atol=1e-5)
        dropped += int(((whole["advantages"] == 0) & (whole["raw"] != 0)).sum())
    assert dropped > 0


def test_a_checkpoint_holds_what_it_holds_under_ddp():
    """Counts of samples and layers, and the stream's position: all that a run goes on from beside the weights."""
    for rank in found(COUNTING):
        assert rank[True]["state"], "the case must count"
        assert rank[True]["streams"] == rank[False]["streams"]
        assert_same_state(rank[True]["state"], rank[False]["state"])


def test_a_run_goes_on_from_its_weights_and_what_a_checkpoint_holds(tmp_path):
    """transformers refuses to resume a model that was sharded as it loaded; the plugin's part of it is tried here."""
    for rank in on_ranks(continued, tmp_path):
        (at_once, counts), (in_two, later) = rank["at once"], rank["in two"]
        for name, value in at_once.items():
            assert torch.equal(in_two[name], value), name
        assert_same_state(later, counts, but=["steps"])  # the second part counts its own


@pytest.mark.parametrize("hook", FAULTS)
def test_a_failure_before_an_exchange_on_one_rank_stops_both(hook, tmp_path):
    for error in on_ranks(fault, tmp_path, hook, patience=20.0):
        assert f"failed in hook '{hook}' at step" in error
        assert "ArithmeticError: only here" in error
        assert error.endswith("[on rank 1 of 2]")


def test_a_target_in_parts_is_asked_as_the_whole(tmp_path):
    on_ranks(parts, ranks=3)
