"""Reward functions called as TRL calls them."""

from __future__ import annotations

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
        ValueError: it gives another number of rewards.
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
    return [None if value is None else float(value) for value in rewards]
