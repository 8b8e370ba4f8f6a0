"""Runs in which the first of two ranks has all labels of a step, and the second none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from trl_ext.startup.column_values import IGNORED
from trl_ext.testing.conformance.filling import filled
from trl_ext.testing.conformance.subject import RANKS, ROWS, Subject
from trl_ext.testing.runs import tokenizer

Settings = dict[str, Any]


def rows_without_labels(subject: Subject) -> Settings:
    """SFT: tokenized rows with the columns that the plugin reads, those of the second rank without labels."""
    data = _tokenized(subject, 24, ROWS["sft"] // RANKS)
    return {"train": data, "train_sampling_strategy": "sequential", "max_length": None}


def completions_without_labels(subject: Subject) -> Settings:
    """GRPO: completions of which those of the second rank are cut off, and streams without labels for it.

    A stream keeps its rows where the plugin chooses them, or the author's data are there for a reason.
    """
    settings: Settings = {"mask_truncated_completions": True, "then": _second_half_cut_off}
    if subject.streams is None and not any(request.select for request in subject.requests()):
        settings["streams"] = {
            request.role: _tokenized(subject, 8 * request.batch_size, request.batch_size)
            for request in subject.requests()
        }
    return settings


def _second_half_cut_off(trainer: Any) -> None:
    """End the completions of the first half of a step's rows, which the first rank has of two, and no other.

    Streams draw their rows in order, so that each rank has those that are meant for it.
    """
    draw, end, ranks = trainer.ext_base_model().generate, tokenizer().eos_token_id, trainer.accelerator.num_processes

    def generate(input_ids: Tensor, **others: Any) -> Tensor:
        ids: Tensor = draw(input_ids=input_ids, **others)
        completions = ids[:, input_ids.shape[1] :]
        completions[completions == end] = 0
        rows = trainer.accelerator.process_index * len(ids) + torch.arange(len(ids))
        completions[rows < len(ids) * ranks // RANKS, -1] = end
        return ids

    trainer.ext_base_model().generate = generate
    for stream in trainer.ext_streams.values():
        stream.request = replace(stream.request, shuffle=False)


def _tokenized(subject: Subject, size: int, block: int) -> Dataset:
    """Tokenized sums, `block` rows with labels and as many without in turn, and the columns that the plugin reads."""
    rows = [list(f"{i % 7}+{i % 5}={i % 7 + i % 5}".encode()) for i in range(size)]
    labels = [row if i // block % RANKS == 0 else [IGNORED] * len(row) for i, row in enumerate(rows)]
    return filled(Dataset.from_dict({"input_ids": rows, "labels": labels}), subject.columns)
