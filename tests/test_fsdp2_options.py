"""FSDP2 with replicas of shards (HSDP) and with mixed precision trains as DDP does, on four ranks.

With both of its makers: transformers, which shards the model as it loads it, and accelerate, which wraps it.
"""

from __future__ import annotations

from typing import Any

import pytest
from helpers import assert_close, assert_equal_bits
from workers import fsdp2_options

from trl_ext.testing.ranks import on_ranks

pytestmark = pytest.mark.slow

RANKS = 4

# SGD on fp32: sums in another order; `lr` times a few steps times the rounding of gradients of size 1.
ROUNDING = {"rtol": 0, "atol": 5e-6}

# bf16 has 8 bits, so that gradients are off by some 2^-8 of them; of norm 1 at most, in 3 steps of rate 0.2.
BF16 = {"rtol": 0, "atol": 3 * 0.2 * 2**-8 * 4}

HSDP = ("hsdp", "hsdp, accelerate")
MIXED = ("mixed precision", "mixed precision, accelerate")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, dict[str, Any]]]:
    return on_ranks(fsdp2_options.main, tmp_path_factory.mktemp("options"), tuple(fsdp2_options.WAYS), ranks=RANKS)


@pytest.mark.parametrize("way", fsdp2_options.WAYS)
def test_all_ranks_hold_the_same(ranks, way):
    for rank in range(1, RANKS):
        assert_equal_bits(ranks[rank][way]["parameters"], ranks[0][way]["parameters"])


@pytest.mark.parametrize("way", [way for way in fsdp2_options.WAYS if way not in ("ddp", *MIXED)])
def test_training_is_that_of_ddp(ranks, way):
    """With an objective, weights, auxiliary losses, and streams before and after the window."""
    mine, theirs = ranks[0][way], ranks[0]["ddp"]
    assert mine["sharded"]
    assert not theirs["sharded"]
    assert mine["dimensions"] == ({2} if way in HSDP else {1})
    assert_close(mine["parameters"], theirs["parameters"], **ROUNDING)
    assert_close(mine["saved"], theirs["saved"], **ROUNDING)
    for sharded, whole in zip(mine["logs"], theirs["logs"], strict=True):
        for key in ("loss", "nll", "grad_norm", "general_stream/nll", "Everything/by sequence"):
            assert key not in whole or sharded[key] == pytest.approx(whole[key], rel=1e-4), key


@pytest.mark.parametrize("way", MIXED)
def test_in_mixed_precision_training_is_that_of_ddp_but_for_bf16(ranks, way):
    mine, theirs = ranks[0][way], ranks[0]["ddp"]
    assert_close(mine["parameters"], theirs["parameters"], **BF16)
    apart = max(float((p - theirs["parameters"][name]).abs().max()) for name, p in mine["parameters"].items())
    assert apart > 4 * ROUNDING["atol"], "the case must compute in bf16"


@pytest.mark.parametrize("way", fsdp2_options.WAYS)
def test_shards_gradients_and_averages_are_fp32(ranks, way):
    assert ranks[0][way]["dtypes"] == {"torch.float32"}


@pytest.mark.parametrize("way", fsdp2_options.WAYS)
def test_scalars_of_views_are_those_of_gathered_gradients(ranks, way):
    """Norms and inner products of the gradient and of both streams', on every rank, against fp64."""
    for rank in range(RANKS):
        errors = ranks[rank][way]["errors"]
        assert len(errors) == 3 * 5
        assert max(errors) < 1e-5


@pytest.mark.parametrize("way", fsdp2_options.WAYS)
def test_the_saved_average_is_that_of_gathered_weights(ranks, way):
    assert_close(ranks[0][way]["saved"], ranks[0][way]["average"], rtol=1e-6, atol=1e-6)  # fp32 against fp64


@pytest.mark.parametrize(("way", "expected"), [("fsdp2", (False, False)), ("hsdp", (True, False))])
def test_early_micro_steps_defer_what_they_did_before_a_stream(ranks, way, expected):
    """With replicas transformers defers the sum between them alone, so that gradients stay in shards."""
    assert ranks[0][way]["deferred"] == {expected}
