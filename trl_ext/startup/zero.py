"""What of DeepSpeed's settings does not go with plugins, or has not been tried with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl_ext.errors import ConfigurationError
from trl_ext.plugins.plugin_set import PluginSet

# What keeps or moves a parameter's part otherwise than ZeRO-3 by itself does; it takes GPUs, or a disk, to try.
_PARTS_ELSEWHERE = ("offload_param", "zero_hpz_partition_size", "zero_quantized_weights", "mics_shard_size")
_WEIGHT_HOOKS = ("weights_updated", "deployed_weights", "sampling_weights")


def refuse_zero(config: Mapping[str, Any], plugins: PluginSet) -> None:
    """Hold a run's DeepSpeed configuration to what plugins have been tried with.

    Args:
        config: DeepSpeed's, as accelerate holds it.
        plugins: the active plugins.

    Raises:
        ConfigurationError: with the setting to change.
    """
    zero = config.get("zero_optimization", {})
    stage = int(zero.get("stage", 0))
    if stage == 0:
        raise ConfigurationError(
            "DeepSpeed with zero_optimization.stage 0 shards nothing and has not been tried with plugins; set stage to "
            "1, 2 or 3, or launch with DDP"
        )
    if config.get("fp16", {}).get("enabled") is True:
        raise ConfigurationError("fp16 under DeepSpeed has not been tried with plugins; set bf16=True and fp16=False")
    if zero.get("offload_optimizer", {}).get("device") == "nvme":
        raise ConfigurationError(
            "zero_optimization.offload_optimizer to a disk takes the gradients away before they can be looked at; set "
            "its device to cpu"
        )
    if config.get("tensor_parallel", {}).get("autotp_size", 0) > 1:
        raise ConfigurationError("tensor_parallel.autotp_size splits layers over ranks, which plugins do not support")
    uses = [hook for hook in _WEIGHT_HOOKS if plugins.implements(hook)]
    if stage < 3 or not uses:
        return
    where = f"hook '{uses[0]}' of plugin '{plugins.calls(uses[0])[0][0]}'"
    for setting in _PARTS_ELSEWHERE:
        value = zero.get(setting, 0)
        if value.get("device", "none") != "none" if isinstance(value, Mapping) else value not in (0, 1, -1, False):
            raise ConfigurationError(
                f"{where} has not been tried with zero_optimization.{setting}, which keeps ZeRO-3's weights elsewhere; "
                "remove the setting or the plugin"
            )
    if plugins.implements("deployed_weights") and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise ConfigurationError(
            f"{where} saves other weights than the trained ones, which ZeRO-3 only does with "
            "zero_optimization.stage3_gather_16bit_weights_on_model_save: true (accelerate: zero3_save_16bit_model)"
        )
