"""Averages on two real ranks: of FSDP2 shards against shards of the averages, and whole runs."""

from __future__ import annotations

import pytest
from fsdp_worker import main as average_shards
from ranks_worker import main as train_and_save

from trl_ext.testing.ranks import on_ranks


def test_the_average_of_shards_is_the_shard_of_the_average():
    on_ranks(average_shards)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp2", "fsdp2-accelerate"])
def test_a_run_on_two_ranks_saves_the_average_of_its_raw_weights(tmp_path, sharding):
    on_ranks(train_and_save, sharding, tmp_path)
