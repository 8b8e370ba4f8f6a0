"""How the methods that change advantages stand to others, in the words that the core compares at start-up."""

from __future__ import annotations

from collections.abc import Mapping

NEW_ADVANTAGES = "new-advantages"
"""What a plugin provides that sets advantages anew, whatever they were before it."""

ALONE: Mapping[str, str] = {NEW_ADVANTAGES: "Both set advantages anew, and those of the first would be lost."}
"""For a plugin that sets advantages anew: it is the only one."""

AFTER: Mapping[str, str] = {
    NEW_ADVANTAGES: "The advantages that it makes would be lost, since they are set anew after it."
}
"""For a plugin that works on the advantages that it receives: what sets them anew comes before it."""
