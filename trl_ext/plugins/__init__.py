"""From the names in a config to checked, ordered and bound calls of plugins. `activate` is public."""

from trl_ext.plugins.activation import PluginSet, activate

__all__ = ["PluginSet", "activate"]
