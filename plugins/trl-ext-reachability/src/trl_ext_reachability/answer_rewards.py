"""Reward functions in TRL's form for common answer formats, to name on the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

# A minus (also U+2212) is a sign unless it joins two things: "10-12" is a range, "2024-01-05" a date.
_SIGN = "(?:(?<![\\w)%.\u2212-])[\u2212-]\\$?|\\$[\u2212-]?)"
_NUMBER = re.compile(_SIGN + r"?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_MARK = "####"


def final_number(completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> list[float | None]:
    """1.0 where a completion's answer equals that of the column `answer`, as in GSM8K ("... #### 18"); else 0.0.

    The answer is the first number on the line of the first "####", or without a mark the last number of the text.
    GSM8K's own code (`extract_answer`, with `re.search`) takes the first mark too: a base model often goes on with a
    question of its own, whose numbers are not its answer. Commas and dollar signs are left out, and "10-12" is a range,
    which ends in 12.

    Args:
        completions: text or messages.
        answer: solutions, or their numbers alone, as text or as numbers. Where it is None the reward is None, which
            says that the function does not apply.
    """
    return [None if a is None else float(_same(_text(c), a)) for c, a in zip(completions, answer, strict=True)]


def exact(completions: Sequence[Any], answer: Sequence[str | None], **columns: Any) -> list[float | None]:
    """1.0 where the completion is `answer`, white space around both aside, else 0.0; None where `answer` is None."""
    pairs = zip(completions, answer, strict=True)
    return [None if a is None else float(_text(c).strip() == a.strip()) for c, a in pairs]


def _same(completion: str, answer: Any) -> bool:
    given = _number(completion)
    return given is not None and given == (_number(answer) if isinstance(answer, str) else Decimal(str(answer)))


def _number(text: str) -> Decimal | None:
    _, mark, rest = text.partition(_MARK)
    if mark:
        # "#### 7 ####" ends at the second mark, and the number may stand on the line below.
        text = next(iter(rest.split(_MARK)[0].strip().splitlines()), "")
    found = _NUMBER.findall(text)
    if not found:
        return None
    return Decimal((found[0] if mark else found[-1]).translate({0x2212: "-", ord(","): "", ord("$"): ""}))


def _text(completion: Any) -> str:
    if isinstance(completion, str):
        return completion
    return (completion[-1]["content"] or "") if completion else ""
