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


def _switch(name: str) -> Callable[[RunDescription], str]:
    """Of a setting that the config of every trainer has, or that of some."""
    return lambda run: f"set {name}=False" if getattr(run.args, name, False) else ""


SETTINGS: dict[str, Callable[[RunDescription], str]] = {
    "peft": lambda run: "leave out the adapter" if run.peft else "",
    "bf16_autocast": lambda run: f"set {' and '.join(run.low_precision)}" if run.low_precision else "",
    "bf16_weights": lambda run: "load the model in float32" if _bf16_weights(run) else "",
    "activation_checkpointing": _switch("activation_checkpointing"),
    "packing": _switch("packing"),
    "padding_free": _switch("padding_free"),
    "fsdp2": lambda run: "train with DDP" if run.sharding == "fsdp2" else "",
}
"""By its name: how a run that has the setting does without it; empty where it has none. The conformance kit has a case
of each name."""


def refuse_declared(run: RunDescription, plugins: PluginSet) -> None:
    """Hold a run to what its plugins declare not to support.

    Raises:
        ConfigurationError: with the plugin, its reason and the setting to change.
    """
    for plugin in plugins:
        for setting, reason in plugin.declared.unsupported.items():
            if setting in SETTINGS and (way_out := SETTINGS[setting](run)):
                raise ConfigurationError(
                    f"plugin {plugin} does not support {setting}: {reason.rstrip('.')}; {way_out}, or "
                    f"remove {plugin.line}"
                )
