"""Reward functions called as TRL calls them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def judge(
    reward: Callable[..., Any],
    name: str,
    rows: Sequence[Mapping[str, Any]],
    texts: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
) -> list[float | None]:
    """One reward for each completion; None where the function has none to give.

    Args:
        reward: the function.
        name: what to call it in errors.
        rows: with `prompt`, and the columns that the function wants.
        texts: the completions, without special tokens; where the prompt is messages they are given as one too.
        completion_ids: their tokens.

    Raises:
        ValueError: it gives another number of rewards, or one that is NaN or infinite.
    """
    rewards = reward(
        prompts=[row["prompt"] for row in rows],
        completions=[
            text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
            for row, text in zip(rows, texts, strict=True)
        ],
        completion_ids=completion_ids,
        **{key: [row[key] for row in rows] for key in rows[0] if key not in ("prompt", "completion")},
    )
    if len(rewards) != len(rows):
        raise ValueError(f"{name} gave {len(rewards)} rewards for {len(rows)} completions")
    for value in rewards:
        if value is not None and not math.isfinite(value):
            raise ValueError(
                f"{name} gave the reward {value}; a reward is a finite number, or None where it does not apply"
            )
    return [None if value is None else float(value) for value in rewards]


def mean_of_judged(rewards: Sequence[Sequence[float | None]], name: str, what: str) -> list[float]:
    """Mean reward of each prompt over its completions that the function judged.

    Args:
        rewards: for each prompt those of its completions.
        name: what to call the function in errors.
        what: what the prompts are, for errors.

    Raises:
        ValueError: no completion of a prompt was judged, so that it has no score.
    """
    judged = [[value for value in row if value is not None] for row in rewards]
    refuse_unjudged([i for i, row in enumerate(judged) if not row], name, what)
    return [sum(row) / len(row) for row in judged]


def refuse_unjudged(rows: Sequence[int], name: str, what: str) -> None:
    """Refuse prompts of which the function judged no completion: to count them as failures would be a wrong score.

    Raises:
        ValueError: there are some.
    """
    if rows:
        shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
        raise ValueError(
            f"{name} gave None for every completion of {len(rows)} prompts of {what} (rows {shown}), which have no "
            "score then; leave these rows out of the data"
        )
