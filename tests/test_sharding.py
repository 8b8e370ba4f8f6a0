"""How a run spreads over ranks is known before the model loads, and what splits more than the batch is refused."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import Idle, Plugin
from transformers.distributed import DistributedConfig

from trl_ext import SFTConfig, SFTTrainer, hookimpl
from trl_ext.errors import ConfigurationError
from trl_ext.startup.sharding import sharding_of
from trl_ext.testing.runs import COMMON, additions, make_sft


class Seen(Exception):
    pass


class Looks(Plugin):
    """Refuses every run, with the sharding that it is told."""

    @hookimpl
    def check(self, run):
        raise Seen(f"sharding={run.sharding}")


@pytest.mark.parametrize("given", [DistributedConfig(fsdp_size=2), {"fsdp_size": 2}], ids=["object", "mapping"])
def test_a_model_that_transformers_will_shard_counts_as_sharded(tmp_path, given):
    config = SFTConfig(str(tmp_path), **COMMON, model_init_kwargs={"distributed_config": given})
    with pytest.raises(ConfigurationError, match="sharding=fsdp2"):
        SFTTrainer("no/such/model", config, train_dataset=additions(4), plugins=[Looks()])


@pytest.mark.parametrize(
    ("asked", "size"),
    [
        ({"distributed_config": DistributedConfig(tp_size=2)}, "tp_size=2"),
        ({"distributed_config": DistributedConfig(pp_size=2)}, "pp_size=2"),
        ({"distributed_config": DistributedConfig(ep_size=2, fsdp_size=2)}, "ep_size=2"),
        ({"tp_size": 2}, "tp_size=2"),
    ],
)
def test_layers_split_over_ranks_are_refused_before_the_model_loads(tmp_path, asked, size):
    config = SFTConfig(str(tmp_path), **COMMON, model_init_kwargs=asked)
    with pytest.raises(ConfigurationError, match=f"DistributedConfig.{size}. splits layers over ranks"):
        SFTTrainer("no/such/model", config, train_dataset=additions(4), plugins=[Idle()])


def test_parallelism_that_the_launcher_asks_for_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    with pytest.raises(ConfigurationError, match=r"parallelism_config .*or from that of accelerate"):
        make_sft(tmp_path, plugins=[Idle()])


@pytest.mark.parametrize(
    ("environment", "sharding"),
    [
        ({}, "none"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp1"),  # accelerate's own default
        ({"ACCELERATE_USE_FSDP": "True", "FSDP_VERSION": "2"}, "fsdp2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "deepspeed"),
    ],
)
def test_the_launchers_environment_is_read_as_accelerate_reads_it(tmp_path, monkeypatch, environment, sharding):
    args: Any = SFTConfig(str(tmp_path), **COMMON)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert sharding_of(args, "no/such/model") == sharding


def test_a_distributed_config_of_one_rank_shards_nothing(tmp_path):
    args = SFTConfig(str(tmp_path), **COMMON, model_init_kwargs={"distributed_config": DistributedConfig()})
    assert sharding_of(args, "no/such/model") == "none"
