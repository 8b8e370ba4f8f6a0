"""What the plugins of this distribution do that others may relate to (`provides`, `conflicts`)."""

COMBINES_TARGET = "target-and-general-gradients"
"""The update is made of the gradients of a target and of general data."""
COMBINED_TWICE = (
    "each of the two makes the update of the gradients of a target and of general data, and the second would take what "
    "the first has made of them for one of these gradients; use one of the two"
)
