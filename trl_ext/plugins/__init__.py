"""From the names in a config to checked, ordered and bound calls of plugins. `activate` is public."""

from trl_ext.plugins.activation import activate
from trl_ext.plugins.plugin_set import PluginSet

__all__ = ["PluginSet", "activate"]
