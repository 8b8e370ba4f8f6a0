"""From the names in a config to checked, ordered and bound calls of plugins. What is listed here is public."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_ext.plugins.activation import activate
    from trl_ext.plugins.places import load_module
    from trl_ext.plugins.plugin_set import PluginSet

__all__ = ["PluginSet", "activate", "load_module"]

_HOMES = {
    "PluginSet": "trl_ext.plugins.plugin_set",
    "activate": "trl_ext.plugins.activation",
    "load_module": "trl_ext.plugins.places",
}


def __getattr__(name: str) -> Any:
    """Load what is asked for: help and listings read sources alone."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
