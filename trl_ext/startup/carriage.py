"""Columns on their way from the data to the batch: TRL cuts, packs and shuffles them together with the tokens.

TRL tokenizes first, and cuts nothing. Then each element of `input_ids` becomes the token together with its values, and
TRL goes on with these lists as with any other: it looks at their lengths alone. At the end they are taken apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from trl_ext.errors import ConfigurationError
from trl_ext.records import Column
from trl_ext.records.columns import CARRIED, ROW, START
from trl_ext.startup.column_values import values_of_tokens
from trl_ext.startup.columns import Wanted, refuse_data

Prepare = Callable[[Any, Any, bool], Any]
"""TRL's preparation of a data set, given the data set, the settings, and whether to pack."""


def prepare_with_columns(
    prepare: Prepare, dataset: Any, args: Any, packing: bool, columns: Sequence[Wanted], what: str
) -> Any:
    """Prepare a data set as TRL does, with its columns under `CARRIED`: for each row a list for each column.

    Args:
        prepare: TRL's preparation.
        dataset: of `datasets`, to be indexed or iterated.
        args: The settings of the preparation; left as they are.
        packing: Whether TRL packs.
        columns: What to carry.
        what: The data in words, for messages.

    Raises:
        ConfigurationError: A row lacks a value, or has one that is not of the column's type.
    """
    if CARRIED in next(iter(dataset), {}):
        return dataset  # evaluated again: it is prepared, and packing it twice would join its samples
    refuse_data(columns, dataset, what, args)
    uncut = copy(args)
    uncut.max_length, uncut.shuffle_dataset = None, False
    tokenized = prepare(dataset, uncut, False)
    options = {"num_proc": args.dataset_num_proc} if isinstance(tokenized, Dataset) else {}
    joined = tokenized.map(_Join(tuple(columns), what), with_indices=True, **options)
    names = (ROW, START, *(wanted.column.name for wanted in columns))
    return prepare(joined, args, packing).map(_take_apart, fn_kwargs={"names": names}, **options)


@dataclass(frozen=True)
class _Join:
    """Joins each token of a row with its values."""

    columns: tuple[Wanted, ...]
    what: str

    def __call__(self, row: Mapping[str, Any], place: int) -> dict[str, Any]:
        tokens = row["input_ids"]
        places = {ROW: [place] * len(tokens), START: [int(i == 0) for i in range(len(tokens))]}
        values = places | {wanted.column.name: self._of(wanted, row, place) for wanted in self.columns}
        names = ("input_ids", *values)
        return {
            "input_ids": [dict(zip(names, each, strict=True)) for each in zip(tokens, *values.values(), strict=True)]
        }

    def _of(self, wanted: Wanted, row: Mapping[str, Any], place: int) -> list[float | int]:
        try:
            return values_of_tokens(wanted.column, row, row["labels"])
        except ValueError as error:
            raise ConfigurationError(
                f"plugin {wanted.plugin} reads the column {wanted.column.name!r}, but row {place} of {self.what} "
                f"{error}. Mend it, or change {wanted.line}"
            ) from None


def _take_apart(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    joined = row["input_ids"]
    values = {name: [each[name] for each in joined] for name in names}
    return {"input_ids": [each["input_ids"] for each in joined], CARRIED: values}


@dataclass
class ColumnCollator(DataCollatorForLanguageModeling):
    """TRL's collator, whose batches also hold the columns under `CARRIED`: (B, L) each, like `input_ids`.

    Padding repeats the last value of its row, so that it counts with the last sample there.
    """

    columns: tuple[Column, ...] = ()

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        width = batch["input_ids"].shape[1]
        carried = {ROW: "int", START: "int"} | {column.name: column.dtype for column in self.columns}
        batch[CARRIED] = {name: self._aligned(examples, name, width, dtype) for name, dtype in carried.items()}
        return batch

    def _aligned(self, examples: list[dict[str, Any]], name: str, width: int, dtype: str) -> Tensor:
        rows = [example[CARRIED][name] for example in examples]
        rows = [list(chain.from_iterable(rows))] if self.padding_free else rows
        last = [0 if name == START or not row else row[-1] for row in rows]
        padded = [row + [end] * (width - len(row)) for row, end in zip(rows, last, strict=True)]
        return torch.tensor(padded, dtype=torch.float32 if dtype == "float" else torch.long)


def collator_with_columns(collator: DataCollatorForLanguageModeling, columns: Sequence[Wanted]) -> ColumnCollator:
    """TRL's collator as it is, with the columns too."""
    options = {field.name: getattr(collator, field.name) for field in fields(collator)}
    return ColumnCollator(**options, columns=tuple(wanted.column for wanted in columns))
