"""Records of supervised data: label tokens of a micro-batch or stream, and the window of sample weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.gradients import GradientView
    from trl_ext.records.step import StreamGradient


UNMARKED = (
    "packing_strategy='wrapped' cuts and joins samples, so that a row is not one; set packing_strategy='bfd', or "
    "packing=False"
)
"""Why a run does not know which token belongs to which sample, and what to change."""


def starts_in(position_ids: Tensor) -> Tensor:
    """(B, T) bool: the positions of 0 that a sample starts with; those at the very end are padding."""
    flat = position_ids.flatten()
    before_padding = (flat != 0).flip(0).cumsum(0).flip(0) > 0
    return ((flat == 0) & before_padding).view(position_ids.shape)


@dataclass(frozen=True)
class TokenRecord:
    """The label tokens of one SFT micro-batch or stream batch (`per_token_loss`)."""

    log_probs: Tensor
    """(B, T) float, differentiable: log-probability of each label; 0 where `mask` is False."""
    entropy: Tensor
    """(B, T) float, differentiable: entropy of the next-token distribution in nats."""
    mask: Tensor
    """(B, T) bool: whether the position has a label."""
    training: bool
    denominator: Tensor
    """() float: what the sum of this micro-batch's losses on this rank is divided by, so that averaging over ranks
    and adding over the window gives the mean over all label tokens of the window."""
    accumulation_steps: int
    """Micro-batches in this window; 1 in evaluation and in streams."""
    progress: float
    """Share of the optimiser steps already done, in [0, 1]."""
    stream: str | None = None
    """Name of the stream, or None for the trainer's own data."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """The outputs named in the plugin's `fused_outputs`, without gradient and 0 where `mask` is False.

    (B, T) float "log_sum_sq_probs" and "mean_logits", (B, T) bool "is_top1". New in 1.5: (B, T) long "label_rank", how
    many tokens have a larger logit than the label; (B, T, K) float "topK_log_probs" with a number for K, such as
    "top8_log_probs", the K largest log-probabilities in falling order."""
    reference_log_probs: Tensor | None = None
    """(B, T) float: log-probabilities of the labels under a reference that the trainer has; TRL's SFT has none, so
    an objective asks a reference of its own where this is None."""
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    """The micro-batch as the model received it."""
    samples_marked: bool = True
    """Whether the batch shows where a sample ends; not where packing_strategy="wrapped" has cut and joined them."""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """The columns that plugins declare: (B, T) aligned with the labels where they are per message or per token, and
    (num_samples,) where they are per sample, for `columns[name][sample_index]` (new in 1.4)."""
    column_totals: Mapping[str, Tensor] = field(default_factory=dict)
    """() float each: the sum of a column's absolute values over all label tokens of the window, as seen from this rank
    like `denominator`: loss x denominator / total has the total for its denominator (new in 1.4)."""
    row_ids: Tensor | None = None
    """(B, T) long: the row of the data, before shuffling and packing, that each label comes from; padding has that of
    the sample before it. Rows of a streaming data set are counted as they are read, in each of its shards by itself.
    Only where a plugin declares columns (new in 1.4)."""
    sample_starts: Tensor | None = None
    """(B, T) bool: whether a sample, or the rest of a cut one, starts at the token; where it starts with a row, that is
    left out. Only where a plugin declares columns (new in 1.4)."""

    @cached_property
    def probs(self) -> Tensor:
        """(B, T) float in [0, 1], differentiable: probability p of each label; 1 where `mask` is False."""
        return self.log_probs.exp()

    @cached_property
    def one_minus_probs(self) -> Tensor:
        """(B, T) float in [0, 1], differentiable: 1 - p, exact where p is close to 1; 0 where `mask` is False."""
        from trl_ext.numerics import one_minus_exp

        return one_minus_exp(self.log_probs)

    @cached_property
    def sample_index(self) -> Tensor:
        """(B, T) long: the sample of the micro-batch that each label belongs to, counted from 0.

        Rows are samples, except under padding-free training, where a position id of 0 starts the next sample; zeros at
        the very end are padding and count with the last one. Where samples are cut and joined, each part that a row
        holds of a sample counts as one.

        Raises:
            ValueError: the samples are not marked, and the run carries no columns.
        """
        import torch

        if not self.samples_marked:
            return self._parts_of_samples()
        rows, width = self.log_probs.shape
        position_ids = self.inputs.get("position_ids")
        if position_ids is None or "attention_mask" in self.inputs:
            return torch.arange(rows, device=self.mask.device).unsqueeze(1).expand(rows, width)
        starts = starts_in(position_ids).flatten().cumsum(0) - 1
        return starts.clamp(min=0).view(position_ids.shape)[:, 1:]

    @cached_property
    def num_samples(self) -> int:
        """Samples in the micro-batch."""
        return int(self.sample_index[-1, -1]) + 1

    def per_token(self, column: str) -> Tensor:
        """(B, T) the values of a column, also of one per sample (new in 1.4).

        Raises:
            KeyError: the batch carries no such column; the plugin has to declare it.
        """
        values = self.columns[column]
        return values[self.sample_index] if values.dim() == 1 else values

    def _parts_of_samples(self) -> Tensor:
        if self.sample_starts is None:
            raise ValueError(UNMARKED)
        starts = self.sample_starts.clone()
        starts[:, 0] = True
        return (starts.flatten().cumsum(0) - 1).view(starts.shape)


@dataclass(frozen=True)
class Window:
    """One accumulation window of this rank, before its first forward (`sample_weights`)."""

    micro_batches: Sequence[Mapping[str, Tensor]]
    """The prepared micro-batches; do not edit."""
    sample_index: Sequence[Tensor]
    """(B, T) long per micro-batch, counted from 0 over the whole window of this rank."""
    num_samples: int
    step: int
    """Optimiser steps already done."""
    streams: Mapping[str, StreamGradient]
    """Gradients of the streams asked for with when="before"."""
    forward: Callable[[int], TokenRecord]
    """Forward of micro-batch i without side effects: no counter, metric or random state of the trainer moves."""
    per_token_loss: Callable[[int], Tensor]
    """(B, T) the active objective's loss of micro-batch i (plain NLL without one), on this rank and without side
    effects; 0 without a label."""
    gradient: Callable[[int, Tensor | None], GradientView]
    """Reduced gradient of micro-batch i's loss, its samples weighted by the second argument (num_samples,), without
    side effects and without touching `p.grad`; every rank must call it alike."""
    columns: Sequence[Mapping[str, Tensor]] = ()
    """For each micro-batch the columns that plugins declare, as `TokenRecord.columns` has them (new in 1.4)."""


@dataclass(frozen=True)
class SampleWeights:
    """Weights of a window's samples, with the denominator they go with (`sample_weights`)."""

    weights: Tensor
    """(num_samples,) float, in the order of the window."""
    denominator: Literal["weighted", "tokens"] = "weighted"
    """"weighted": divide by the sum over ranks of weight x label tokens (the token mean over the kept samples);
    "tokens": divide by all label tokens of the window, as plain TRL does."""
