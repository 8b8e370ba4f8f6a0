"""One value for each token, from what a row of the data holds for the whole sample, a message or a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trl_ext.records import Column

COMPLETION_MASK = "completion_mask"
"""The column that TRL itself makes of a prompt and a completion: 1 for each token of the completion."""
IGNORED = -100
"""The label of a token that is not trained on."""


def values_of_tokens(column: Column, row: Mapping[str, Any], labels: Sequence[int]) -> list[float | int]:
    """The values of a tokenized row, before it is cut or packed.

    Args:
        column: What is asked for.
        row: The row with all columns of the data.
        labels: (n,) the labels of its tokens.

    Returns:
        (n,) numbers; of a column per message 0 where there is no label.

    Raises:
        ValueError: A value is missing, of another type, or there are more or fewer than the tokens or turns.
    """
    if column.per == "sample":
        return [column.encode(row.get(column.name))] * len(labels)
    if column.per == "message":
        return _over_turns(column, row, labels)
    given = row.get(column.name)
    if given is None and column.name == COMPLETION_MASK:  # TRL has made labels of it, and dropped it
        given = [int(label != IGNORED) for label in labels]
    if given is None:
        given = [None] * len(labels)
    if len(given) != len(labels):
        raise ValueError(f"has {len(given)} values for {len(labels)} tokens")
    return [column.encode(value) for value in given]


def turns(labels: Sequence[int]) -> list[slice]:
    """The stretches of tokens that have labels: the assistant's turns, where nothing else is trained on."""
    edges = [i for i in range(len(labels) + 1) if _trained(labels, i) != _trained(labels, i - 1)]
    return [slice(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def messages_of(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The messages of a row, those of a prompt and its completion one after the other; none where it holds text."""
    parts = [row.get(name) for name in ("messages", "conversations", "prompt", "completion")]
    return [message for part in parts if isinstance(part, list) for message in part]


def values_of_turns(column: Column, row: Mapping[str, Any]) -> list[Any]:
    """A row's value for each message of the assistant, in order: keys of the messages, or a list beside them.

    Raises:
        ValueError: The list has neither a value for each message nor one for each of the assistant's.
    """
    messages, given = messages_of(row), row.get(column.name)
    own = [_is_assistant(message) for message in messages]
    if given is None:
        return [message.get(column.name) for message, is_own in zip(messages, own, strict=True) if is_own]
    if not isinstance(given, list | tuple):
        raise ValueError(f"has {given!r}, and not a list with a value for each message")
    if not messages or len(given) == sum(own):
        return list(given)
    if len(given) != len(messages):
        raise ValueError(f"has {len(given)} values for {len(messages)} messages, {sum(own)} of them the assistant's")
    return [value for value, is_own in zip(given, own, strict=True) if is_own]


def _over_turns(column: Column, row: Mapping[str, Any], labels: Sequence[int]) -> list[float | int]:
    given, marked = values_of_turns(column, row), turns(labels)
    completion = row.get("completion")
    if isinstance(completion, list) and len(marked) == sum(map(_is_assistant, completion)):
        given = given[len(given) - len(marked) :]  # the prompt is not trained on
    if len(given) != len(marked):
        raise ValueError(
            f"has {len(given)} turns of the assistant, of which the chat template tells {len(marked)} apart; use a "
            "template with {% generation %} around each turn"
        )
    values: list[float | int] = [0.0 if column.dtype == "float" else 0] * len(labels)
    for value, turn in zip(given, marked, strict=True):
        values[turn] = [column.encode(value)] * (turn.stop - turn.start)
    return values


def _trained(labels: Sequence[int], i: int) -> bool:
    return 0 <= i < len(labels) and labels[i] != IGNORED


def _is_assistant(message: Mapping[str, Any]) -> bool:
    return message.get("role", message.get("from")) == "assistant"
