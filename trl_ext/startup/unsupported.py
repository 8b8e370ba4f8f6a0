"""Settings that a plugin may declare not to support (its class attribute `unsupported`): such runs are refused."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from trl_ext.errors import ConfigurationError
from trl_ext.plugins.plugin_set import PluginSet
from trl_ext.records import RunDescription


def _bf16_weights(run: RunDescription) -> bool:
    """Whether any weight of the model is bf16, which shows once it has loaded."""
    return isinstance(run.model, nn.Module) and any(p.dtype == torch.bfloat16 for p in run.model.parameters())


SETTINGS: dict[str, tuple[Callable[[RunDescription], bool], str]] = {
    "peft": (lambda run: run.peft, "leave out the adapter"),
    "bf16_autocast": (lambda run: bool(run.args.bf16), "set bf16=False"),
    "bf16_weights": (_bf16_weights, "load the model in float32"),
    "activation_checkpointing": (
        lambda run: bool(run.args.activation_checkpointing),
        "set activation_checkpointing=False",
    ),
    "packing": (lambda run: bool(getattr(run.args, "packing", False)), "set packing=False"),
    "padding_free": (lambda run: bool(getattr(run.args, "padding_free", False)), "set padding_free=False"),
    "fsdp2": (lambda run: run.sharding == "fsdp2", "train with DDP"),
}
"""By its name: whether a run has the setting, and how to do without. The conformance kit has a case of each name."""


def refuse_declared(run: RunDescription, plugins: PluginSet) -> None:
    """Hold a run to what its plugins declare not to support.

    Raises:
        ConfigurationError: with the plugin, its reason and the setting to change.
    """
    for plugin in plugins:
        for setting, reason in plugin.declared.unsupported.items():
            if setting in SETTINGS and SETTINGS[setting][0](run):
                raise ConfigurationError(
                    f"plugin {plugin} does not support {setting}: {reason.rstrip('.')}; {SETTINGS[setting][1]}, or "
                    f"remove {plugin.line}"
                )
