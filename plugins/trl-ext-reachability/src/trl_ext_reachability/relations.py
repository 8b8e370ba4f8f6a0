"""How plugins that set advantages stand to those before them, in the words that the core compares at start-up."""

from __future__ import annotations

NEW_ADVANTAGES = "new-advantages"
"""What a plugin provides that sets advantages anew, whatever they were before it."""

AFTER_NEW_ADVANTAGES = {
    NEW_ADVANTAGES: "It sets advantages anew, and would throw away those of the plugin that is named before it. Name "
    "it first; or let it keep them, by pg:rewards=given or process-reward:outcome=1; or keep one of the two."
}
"""For a plugin whose advantages are to be trained on: those that set them anew come before it."""
