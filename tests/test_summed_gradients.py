"""The gradient of a stream is summed over ranks in any micro-step, however the model is wrapped and sharded.

Two ranks accumulate two micro-batches, of which transformers sums the gradients after the second. The gradient of a
stream before the window is needed in the first one.
"""

from __future__ import annotations

from typing import Any

import pytest
from helpers import assert_close, assert_equal_bits
from workers import summed

from trl_ext.testing.ranks import on_ranks

pytestmark = pytest.mark.slow

# SGD on fp32: sums in another order, of gradients of size 1.
ROUNDING = {"rtol": 0, "atol": 5e-6}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, dict[str, Any]]]:
    return on_ranks(summed.main, tmp_path_factory.mktemp("summed"))


@pytest.mark.parametrize("way", summed.WAYS)
def test_all_ranks_see_the_same_gradients_of_streams(ranks, way):
    for mine, theirs in zip(ranks[1][way]["seen"], ranks[0][way]["seen"], strict=True):
        assert_equal_bits(mine, theirs)


@pytest.mark.parametrize(("way", "reference"), summed.WAYS.items())
def test_gradients_of_streams_are_those_of_ddp(ranks, way, reference):
    mine, theirs = ranks[0][way], ranks[0][reference]
    assert len(mine["seen"]) == 2
    for found, expected in zip(mine["seen"], theirs["seen"], strict=True):
        assert_close(found, expected, **ROUNDING)
    assert_close(mine["parameters"], theirs["parameters"], **ROUNDING)


@pytest.mark.parametrize("way", summed.WAYS)
def test_a_plugin_is_told_of_shards_below_an_adapter_too(ranks, way):
    """A forward takes all ranks there, whatever trains."""
    assert ranks[0][way]["sharded"] == ("shards" in way)
