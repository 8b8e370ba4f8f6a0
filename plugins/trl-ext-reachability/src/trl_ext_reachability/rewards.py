"""Reward functions in TRL's form for common answer formats, to name on the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def final_number(completions: Sequence[Any], answer: Sequence[str], **columns: Any) -> list[float]:
    """1.0 where the last number of the completion equals the last one of `answer`, as in GSM8K ("... #### 18")."""
    return [float(_last(_text(c)) == _last(a) is not None) for c, a in zip(completions, answer, strict=True)]


def exact(completions: Sequence[Any], answer: Sequence[str], **columns: Any) -> list[float]:
    """1.0 where the completion is `answer`, white space around both aside."""
    return [float(_text(c).strip() == a.strip()) for c, a in zip(completions, answer, strict=True)]


def _last(text: str) -> Decimal | None:
    numbers = _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
