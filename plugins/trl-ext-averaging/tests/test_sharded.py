"""Averages on real ranks: of FSDP2 shards against shards of the averages, taken over by others, and whole runs."""

from __future__ import annotations

import pytest
from fsdp_worker import main as average_shards
from ranks_worker import main as train_and_save
from resharding_worker import save, take_over

from trl_ext.testing.ranks import on_ranks


def test_the_average_of_shards_is_the_shard_of_the_average():
    on_ranks(average_shards)


@pytest.mark.parametrize(("savers", "others"), [(2, (3, 1)), (1, (2,))], ids=["sharded", "whole"])
def test_any_number_of_ranks_takes_over_the_average_of_shards(tmp_path, savers, others):
    on_ranks(save, tmp_path, ranks=savers)
    for ranks in others:
        on_ranks(take_over, tmp_path, ranks=ranks)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp2", "fsdp2-accelerate"])
def test_a_run_on_two_ranks_saves_the_average_of_its_raw_weights(tmp_path, sharding):
    on_ranks(train_and_save, sharding, tmp_path)
