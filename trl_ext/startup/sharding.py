"""How a run spreads over ranks: as its settings say before the model loads, and as the loaded model has it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, Literal

from accelerate import Accelerator, ParallelismConfig
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from trl_ext.errors import ConfigurationError

Sharding = Literal["none", "ddp", "fsdp1", "fsdp2", "deepspeed"]


def sharding_of(args: Any, model: Any) -> Sharding:
    """How the run spreads over ranks, as far as the arguments, the launcher's environment and the model say.

    The defaults of FSDP's version differ: transformers' `fsdp` means FSDP2, accelerate's environment FSDP1.
    """
    if getattr(args, "deepspeed", None) or _is_set("ACCELERATE_USE_DEEPSPEED"):
        return "deepspeed"
    distributed = distributed_config_of(args, model)
    if distributed is not None and distributed.dp_size > 1:
        return "fsdp2"
    if getattr(args, "fsdp", None):
        return "fsdp1" if str((args.fsdp_config or {}).get("version", 2)) == "1" else "fsdp2"
    if _is_set("ACCELERATE_USE_FSDP"):
        return "fsdp1" if os.environ.get("FSDP_VERSION", "1") == "1" else "fsdp2"
    return "ddp" if args.world_size > 1 else "none"


def sharding_of_loaded(accelerator: Accelerator, model: nn.Module) -> Sharding:
    """How the run spreads over ranks, by what accelerate will do and by the parameters of the loaded model."""
    kind = accelerator.distributed_type.value.lower()
    if kind == "deepspeed":
        return "deepspeed"
    if kind == "fsdp":
        return "fsdp2" if accelerator.is_fsdp2 else "fsdp1"
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return "fsdp2"
    return "ddp" if accelerator.num_processes > 1 else "none"


def offloads(args: Any, model: Any) -> bool:
    """Whether FSDP2 is to keep parameters and gradients in host memory."""
    distributed = distributed_config_of(args, model)
    if distributed is not None and distributed.dp_size > 1:
        return bool(distributed.fsdp_cpu_offload)
    fsdp = getattr(args, "fsdp", None)
    if not fsdp and not _is_set("ACCELERATE_USE_FSDP"):
        return False
    # The launcher's word counts where the config does not ask for it, cpu_offload=False included.
    return bool(fsdp and (args.fsdp_config or {}).get("cpu_offload")) or _is_set("FSDP_OFFLOAD_PARAMS")


def refuse_dimensions(args: Any, model: Any) -> None:
    """Refuse every way to split more than the batch over ranks.

    Raises:
        ConfigurationError: with the setting to change.
    """
    asked = getattr(args, "parallelism_config", None)
    if asked is None and _is_set("ACCELERATE_USE_PARALLELISM_CONFIG"):
        asked = ParallelismConfig()  # of the launcher's environment
    if asked is not None and (split := _sizes(asked, ("tp_size", "cp_size", "sp_size"))):
        raise ConfigurationError(
            f"parallelism_config with {split} (tensor, context or sequence parallelism) is not supported with plugins: "
            "it splits the layers or the sequence that hooks see; keep nothing but dp_replicate_size and dp_shard_size "
            "in it, or in that of accelerate"
        )
    distributed = distributed_config_of(args, model)
    if distributed is None:
        return
    if split := _sizes(distributed, ("tp_size", "pp_size", "ep_size")):
        raise ConfigurationError(
            f"DistributedConfig({split}) splits layers over ranks (tensor, pipeline or expert parallelism), which is "
            "not supported with plugins: a hook would see parts of tensors; keep nothing but fsdp_size and "
            "dp_replicate_size in it"
        )


def distributed_config_of(args: Any, model: Any) -> DistributedConfig | None:
    """How transformers shards the model when it loads: that of a loaded model, or what `model_init_kwargs` asks for."""
    loaded = getattr(getattr(model, "config", None), "distributed_config", None)
    if loaded is not None or not isinstance(model, str):
        return loaded
    asked = getattr(args, "model_init_kwargs", None) or {}
    given = asked.get("distributed_config")
    if isinstance(given, dict):
        return DistributedConfig.from_dict(given)
    alone = {name: asked[name] for name in ("tp_size", "tp_plan") if asked.get(name) is not None}
    return DistributedConfig(**alone) if given is None and alone else given


def _sizes(config: Any, names: Iterable[str]) -> str:
    """What is split by more than one of these sizes, as it is set; empty where nothing is."""
    return ", ".join(f"{name}={size}" for name in names if (size := getattr(config, name)) > 1)


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"
