"""How a run spreads over ranks is known before the model loads, and what splits more than the batch is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from helpers import Idle, Plugin
from transformers.distributed import DistributedConfig

from trl_ext import SFTConfig, SFTTrainer, hookimpl
from trl_ext.errors import ConfigurationError
from trl_ext.startup.sharding import refuse_dimensions, sharding_of
from trl_ext.testing.runs import COMMON, additions, make_sft, tiny_model


class Seen(Exception):
    pass


class Looks(Plugin):
    """Refuses every run, with the sharding and the settings of precision that it is told."""

    @hookimpl
    def check(self, run):
        raise Seen(f"sharding={run.sharding}, low precision: {', '.join(run.low_precision) or 'no'};")


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


@pytest.mark.parametrize("size", ["tp_size", "cp_size", "sp_size"])
def test_parallelism_that_the_launcher_asks_for_is_refused(tmp_path, monkeypatch, size):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{size.upper()}", "2")
    with pytest.raises(ConfigurationError, match=rf"parallelism_config with {size}=2 .*or in that of accelerate"):
        make_sft(tmp_path, plugins=[Idle()])


def test_replicas_of_shards_that_the_launcher_asks_for_are_none_of_it(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "2")
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_SHARD_SIZE", "4")
    refuse_dimensions(SimpleNamespace(), tiny_model())


OFFLOADED = {
    "transformers": ({"model_init_kwargs": {"distributed_config": {"fsdp_size": 2, "fsdp_cpu_offload": True}}}, {}),
    "accelerate": ({}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}),
    "both": ({"fsdp": True, "fsdp_config": {"cpu_offload": False}}, {"FSDP_OFFLOAD_PARAMS": "true"}),
}


@pytest.mark.parametrize("asked", OFFLOADED)
@pytest.mark.parametrize("names", ["ema", "weighted"])
def test_parameters_in_host_memory_are_refused_where_plugins_touch_them(tmp_path, monkeypatch, asked, names):
    settings, environment = OFFLOADED[asked]
    config = SFTConfig(str(tmp_path), **COMMON, **settings, plugins=[names])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=r"has not been tried .*host memory.*fsdp_cpu_offload\) to False"):
        SFTTrainer("no/such/model", config, train_dataset=additions(4))


@pytest.mark.parametrize("asked", OFFLOADED)
def test_parameters_in_host_memory_are_no_matter_to_an_objective(tmp_path, monkeypatch, asked):
    settings, environment = OFFLOADED[asked]
    config = SFTConfig(str(tmp_path), **COMMON, **settings, plugins=["power"])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match="sharding=fsdp2"):  # what `Looks` says, last of all
        SFTTrainer("no/such/model", config, train_dataset=additions(4), plugins=[Looks()])


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


LOWERED = {
    "nothing": ({}, {}, "no"),
    "the launcher that says no": ({}, {"ACCELERATE_MIXED_PRECISION": "no"}, "no"),
    "the config": ({"bf16": True}, {}, "bf16=False"),
    "the launcher": ({}, {"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision of accelerate's launcher to 'no'"),
    "transformers": (
        {"model_init_kwargs": {"distributed_config": {"fsdp_size": 2, "fsdp_mixed_precision": True}}},
        {},
        "fsdp_mixed_precision=False",
    ),
    "transformers, on one rank": (
        {"model_init_kwargs": {"distributed_config": {"fsdp_mixed_precision": True}}},
        {},
        "no",
    ),
}


@pytest.mark.parametrize("by", LOWERED)
def test_low_precision_is_seen_whoever_asks_for_it(tmp_path, monkeypatch, by):
    settings, environment, told = LOWERED[by]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = SFTConfig(str(tmp_path), **COMMON | settings)
    with pytest.raises(ConfigurationError, match=f"low precision: {told}"):
        SFTTrainer("no/such/model", config, train_dataset=additions(4), plugins=[Looks()])


class NeedsFp32(Idle):
    unsupported = {"bf16_autocast": "It takes differences of losses."}


def test_a_launchers_bf16_is_refused_to_a_plugin_that_does_not_support_it(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ConfigurationError, match="set mixed_precision of accelerate's launcher to 'no'"):
        make_sft(tmp_path, plugins=[NeedsFp32()])
