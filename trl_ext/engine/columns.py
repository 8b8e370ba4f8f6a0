"""Columns of a batch: aligned with its labels, one for each sample where they are declared so, and summed up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trl_ext.records import Column, TokenRecord
from trl_ext.records.columns import CARRIED, ROW, START
from trl_ext.records.tokens import rows_are_joined, starts_in


def without_columns(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch as the model takes it."""
    return {name: value for name, value in batch.items() if name != CARRIED}


def with_columns(tokens: TokenRecord, batch: Mapping[str, Any], columns: Mapping[str, Column]) -> TokenRecord:
    """The record of a batch, with the columns that the batch carries.

    Args:
        tokens: The record.
        batch: as the data loader gave it.
        columns: What plugins declare, by name.
    """
    carried = {name: values[:, 1:] for name, values in batch.get(CARRIED, {}).items()}
    if not carried:
        return tokens
    starts = carried.pop(START) == 1
    if rows_are_joined(batch):  # a sample starts anywhere
        starts |= starts_in(batch["position_ids"])[:, 1:]
    tokens = replace(tokens, row_ids=carried.pop(ROW), sample_starts=starts)
    per_sample = {name for name in carried if columns[name].per == "sample"}
    return replace(
        tokens,
        columns={
            name: _of_samples(values, tokens) if name in per_sample else values for name, values in carried.items()
        },
    )


def _of_samples(values: Tensor, tokens: TokenRecord) -> Tensor:
    """(num_samples,) the value that all tokens of a sample have."""
    return values.new_zeros(tokens.num_samples).scatter(0, tokens.sample_index.flatten(), values.flatten())


def column_totals(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """() float each: the sum of a column's absolute values over the label tokens of a batch."""
    mask = batch["labels"][:, 1:] != -100
    carried = batch.get(CARRIED, {})
    return {
        name: (values[:, 1:].abs() * mask).sum().float() for name, values in carried.items() if name not in (ROW, START)
    }


def over_ranks(totals: Mapping[str, Tensor], sum_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """() float each: columns' totals over all ranks, in one sum. Collective where there are any columns."""
    if not totals:
        return {}
    return dict(zip(totals, sum_over_ranks(torch.stack(list(totals.values()))), strict=True))
