"""What the core knows of one plugin of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trl_ext.plugins.declarations import Declarations


@dataclass(frozen=True, eq=False)
class ActivePlugin:
    """One plugin of a run."""

    name: str
    """The label, or else the plugin's name; prefixes its metrics and names its state."""
    instance: Any
    distribution: str | None
    """None for an instance of a class that no distribution provides."""
    version: str | None
    options: dict[str, Any]
    """All options with their values, as JSON."""
    citation: str
    declared: Declarations
    line: str
    """The config line that activates it, for messages."""

    @property
    def origin(self) -> str:
        """Its distribution with the version, or else its class."""
        return f"{self.distribution} {self.version}" if self.distribution else class_of(self.instance)

    def __str__(self) -> str:
        return f"{self.name!r} ({self.origin})"


def class_of(instance: Any) -> str:
    """The class of an instance in words, for messages."""
    return f"class {type(instance).__qualname__} of {type(instance).__module__}"
