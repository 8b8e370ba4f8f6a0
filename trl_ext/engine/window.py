"""The accumulation window: the micro-batches of one optimiser step, and which samples are in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trl_ext.records import TokenRecord


@dataclass
class AccumulationWindow:
    """The window that this rank trains on now, and how far the step has come."""

    micro_batches: Sequence[Any] = ()
    """As the data loader gave them."""
    num_items: Tensor | int | None = None
    """Label tokens of the window over all ranks, as transformers counts them."""
    done: int = 0
    """Micro-steps already done."""
    sequences: Tensor | None = None
    """() float: samples of the window over all ranks, where an auxiliary loss may need them (SFT)."""
    weights: Sequence[Tensor] | None = None
    """(B, T) float per micro-batch: the weight of each label's loss, where a plugin weighs samples (SFT)."""

    def start(self, micro_batches: Sequence[Any], num_items: Tensor | int | None) -> None:
        """Begin the next window."""
        self.micro_batches, self.num_items, self.done = micro_batches, num_items, 0
        self.sequences = self.weights = None


def sample_index(batches: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """(B, T) long per micro-batch: the sample that each label belongs to, counted from 0 over the whole window."""
    index, offset = [], 0
    for batch in batches:
        labels = batch["labels"][:, 1:]
        none = labels.new_zeros(labels.shape)
        record = TokenRecord(none, none, none, True, none, 1, 0.0, inputs=batch)
        index.append(record.sample_index + offset)
        offset += record.num_samples
    return index


def label_tokens(num_items: Tensor | int, counted_ranks: int, device: torch.device) -> Tensor:
    """() float: the window's label tokens, at least one, as seen from a rank whose gradients DDP averages with others'.

    Args:
        num_items: the window's label tokens, as transformers counts them.
        counted_ranks: ranks that they are counted over: all, or 1 where each rank counts its own.
        device: of the result.
    """
    return torch.as_tensor(num_items, device=device).clamp(min=1) / counted_ranks
