"""How the methods of this distribution stand to each other, and to plugins that set advantages."""

from __future__ import annotations

from collections.abc import Mapping

MIXING = "sft-in-grpo"
"""What each of the methods provides: it brings SFT into a step of another trainer."""

ONE_AT_A_TIME: Mapping[str, str] = {MIXING: "Both bring SFT into the step, and neither knows of the other's gradient."}

AFTER_NEW_ADVANTAGES: Mapping[str, str] = {
    "new-advantages": "It sets advantages anew, also those of the prompts that go to SFT, which have none."
}
"""For a method that takes prompts out of the RL loss by their advantages."""
