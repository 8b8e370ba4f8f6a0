"""How plugins that set advantages stand to others, in the words that the core compares at start-up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NEW_ADVANTAGES = "new-advantages"
"""What a plugin provides that sets advantages anew, whatever they were before it."""

_ADVICE = "set pg:rewards=given to train on them, or process-reward:outcome=1 to add to them."

ALONE: Mapping[str, str] = {
    NEW_ADVANTAGES: f"Both set advantages anew, and those of the first would be lost; {_ADVICE}"
}
"""For a plugin that sets advantages anew: it is the only one."""

AFTER: Mapping[str, str] = {
    NEW_ADVANTAGES: f"The advantages that it makes would be lost, since they are set anew after it; {_ADVICE}"
}
"""For a plugin that works on the advantages that it receives: what sets them anew comes before it."""


def declare(plugin: Any, **relations: Any) -> None:
    """Put relations that follow from a plugin's options in the place of those that its class declares.

    Args:
        plugin: The instance.
        **relations: `provides`, `conflicts`, `after`.
    """
    vars(plugin).update(relations)
