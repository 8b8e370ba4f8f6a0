"""From the names in a config to checked, ordered and bound calls of plugins."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "activate":
        from trl_ext.plugins.activation import activate

        return activate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
