"""Values for the columns that a plugin reads, in data that have none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from trl_ext.records import Column
from trl_ext.startup.column_values import COMPLETION_MASK, IGNORED


def filled(data: Dataset, columns: Sequence[Column]) -> Dataset:
    """The data with a value in each column that they lack, other ones from row to row.

    Rows hold a prompt with or without a completion, or are tokenized with labels of one turn at most. Text gets values
    per sample alone: those per message need a conversation, and TRL marks the completion itself.
    """
    for column in columns:
        lacking = column.name not in data.column_names
        if lacking and (column.per == "sample" or "input_ids" in data.column_names):
            data = data.add_column(column.name, [_values(column, i, row) for i, row in enumerate(data)])
    return data


def _values(column: Column, i: int, row: Mapping[str, Any]) -> Any:
    """What a row holds: a value, or a list with one for its turn, or for each of its tokens."""
    if column.name == COMPLETION_MASK:
        return [int(place > 1 and label != IGNORED) for place, label in enumerate(row["labels"])]
    value = column.values[i % len(column.values)] if column.dtype == "text" else _number(column.dtype, i)
    if column.per == "token":
        return [value] * len(row["input_ids"])
    if column.per == "message":
        return [value] * any(label != IGNORED for label in row["labels"])
    return value


def _number(dtype: str, i: int) -> float | int:
    """1/2 and 1 in turn, or 0 and 1."""
    return (1 + i % 2) / 2 if dtype == "float" else i % 2
