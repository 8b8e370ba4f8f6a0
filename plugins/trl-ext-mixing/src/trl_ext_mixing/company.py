"""How the methods of this distribution relate to each other: one at a time."""

from __future__ import annotations

from collections.abc import Mapping

MIXING = "sft-in-grpo"
"""What each of them provides: it brings SFT into a step of GRPO."""

ONE_AT_A_TIME: Mapping[str, str] = {
    MIXING: "Both bring SFT into the step, and neither knows of the other's; keep one of them in `plugins`."
}
