"""Rewards of these comparisons, in TRL's form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trl_ext_probing.answers import text_of


def says_the_answer(completions: Sequence[Any], answer: Sequence[str], **columns: Any) -> list[float]:
    """1.0 where the words of `answer` are in the completion, whatever stands around them."""
    return [float(a.lower() in text_of(c).lower()) for c, a in zip(completions, answer, strict=True)]
