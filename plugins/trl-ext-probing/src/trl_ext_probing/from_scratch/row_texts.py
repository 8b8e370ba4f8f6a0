"""The texts in a row of any of TRL's data formats."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]


def evaluation_row(row: Row) -> dict[str, Any]:
    """A row with `prompt`, and with `completion` where it shows an answer; of messages, the last turn is the answer."""
    if "prompt" in row or not row.get("messages"):
        return dict(row)
    *prompt, answer = row["messages"]
    return {**{key: value for key, value in row.items() if key != "messages"}, "prompt": prompt, "completion": [answer]}


def completion_text(row: Row) -> str | None:
    """The answer of a row as text; None where it has none that can be told from the prompt."""
    completion = evaluation_row(row).get("completion")
    return None if not completion else _text(completion, ("assistant",))


def prompt_text(row: Row) -> str:
    """A prompt as text, without system messages: those are the same for every sample."""
    return _text(evaluation_row(row).get("prompt") or "", ("user", "assistant", "tool"))


def whole_text(row: Row) -> str:
    """All text of a training sample, prompt before answer."""
    parts = [row[key] for key in ("prompt", "completion", "messages", "text") if row.get(key)]
    # Prompt and completion of plain text continue each other; turns of a conversation do not.
    return ("" if all(isinstance(part, str) for part in parts) else "\n").join(_text(part) for part in parts)


def _text(value: Any, roles: Iterable[str] | None = None) -> str:
    if isinstance(value, str):
        return value
    turns = [turn for turn in value if roles is None or turn.get("role") in roles]
    return "\n".join(turn["content"] for turn in turns if isinstance(turn.get("content"), str))
