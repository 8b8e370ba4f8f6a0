"""Rewards for worked solutions that end in a number, as in GSM8K: "... #### 72"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")
_MARK = "####"


def final_number(text: str) -> Decimal | None:
    """The number after the last "####", or without one the last number of the text; None where there is none."""
    marked = text.rpartition(_MARK)
    found = _NUMBER.findall(marked[2])
    if not found:
        return None
    chosen = found[0] if marked[1] else found[-1]
    try:
        return Decimal(chosen.replace(",", "").replace("$", ""))
    except InvalidOperation:  # "1,,": not a number after all
        return None


def exact_answer(completions: Sequence[Any], answer: Sequence[str], **columns: Any) -> list[float]:
    """1.0 where a completion's final number equals that of the solution in the column `answer`, else 0.0."""
    return [
        float(_equal(c if isinstance(c, str) else c[-1]["content"], a))
        for c, a in zip(completions, answer, strict=True)
    ]


def answer_format(completions: Sequence[Any], **columns: Any) -> list[float]:
    """1.0 where a completion marks a number as its answer: "#### 72", else 0.0."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(_MARK in text and final_number(text) is not None) for text in texts]


def _equal(completion: str, answer: str) -> bool:
    given, right = final_number(completion), final_number(answer)
    return given is not None and given == right
