"""Rewards in TRL's form for answers to problems: a final number as in GSM8K ("... #### 72"), text, or LaTeX."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from trl_ext.errors import ConfigurationError

# A minus (also U+2212) is a sign unless it joins two things: "10-12" is a range, "2024-01-05" a date.
_SIGN = "(?:(?<![\\w)%.\u2212-])[\u2212-]\\$?|\\$[\u2212-]?)"
_NUMBER = re.compile(_SIGN + r"?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_MARK = "####"


def final_number(text: str) -> Decimal | None:
    """The number on the line of the first "####", or without a mark the last number of the text; None without any.

    The first mark counts, as in GSM8K's own code (`extract_answer`): a base model often goes on with a question of its
    own, whose answer is another one. Commas and dollar signs are left out, and a range, "10-12", ends in its upper end.
    """
    _, mark, rest = text.partition(_MARK)
    if mark:
        # "#### 7 ####" ends at the second mark, and the number may stand on the line below.
        text = next(iter(rest.split(_MARK)[0].strip().splitlines()), "")
    found = _NUMBER.findall(text)
    if not found:
        return None
    try:
        return Decimal((found[0] if mark else found[-1]).translate({0x2212: "-", ord(","): "", ord("$"): ""}))
    except InvalidOperation:  # "1,,": not a number after all
        return None


def exact_answer(completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> list[float | None]:
    """1.0 where a completion's final number equals that of the solution in the column `answer`, else 0.0.

    Args:
        completions: text or messages.
        answer: solutions, or their numbers alone, as text or as numbers. Where it is None the reward is None, which
            for TRL and the probes means that it does not apply.
    """
    return [None if a is None else float(_equal(text_of(c), a)) for c, a in zip(completions, answer, strict=True)]


def exact_text(completions: Sequence[Any], answer: Sequence[str | None], **columns: Any) -> list[float | None]:
    """1.0 where the completion is `answer`, white space around both aside, else 0.0; None where `answer` is None."""
    pairs = zip(completions, answer, strict=True)
    return [None if a is None else float(text_of(c).strip() == a.strip()) for c, a in pairs]


def answer_format(completions: Sequence[Any], **columns: Any) -> list[float]:
    """1.0 where a completion marks a number as its answer: "#### 72", else 0.0."""
    texts = [text_of(c) for c in completions]
    return [float(_MARK in text and final_number(text) is not None) for text in texts]


def latex_answer(completions: Sequence[Any], answer: Sequence[str | None], **columns: Any) -> list[float | None]:
    """1.0 where math-verify finds the completion's answer equal to `answer`; None where that has none it can read.

    Raises:
        ConfigurationError: math-verify is not installed.
    """
    try:
        from math_verify import parse, verify  # type: ignore[import-not-found]
    except ImportError as error:
        raise ConfigurationError(
            "the reward latex_answer needs math-verify: pip install 'trl-ext-probing[latex]'"
        ) from error
    gold = [parse(a) if a else [] for a in answer]
    return [
        float(verify(right, parse(text_of(c)))) if right else None for right, c in zip(gold, completions, strict=True)
    ]


def text_of(completion: Any) -> str:
    """The text of a completion: as it is, or what its last message says."""
    if isinstance(completion, str):
        return completion
    return (completion[-1]["content"] or "") if completion else ""


def _equal(completion: str, answer: Any) -> bool:
    given = final_number(completion)
    right = final_number(answer) if isinstance(answer, str) else Decimal(str(answer))
    return given is not None and given == right
