"""A window's columns and samples: totals, what `sample_weights` may look at, and how its answer enters the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trl_ext.engine.columns import column_totals, over_ranks, with_columns, without_columns
from trl_ext.engine.context import AccumulationWindow, RunContext
from trl_ext.engine.losses import label_tokens, per_token_loss, token_record
from trl_ext.engine.passes import ExtraPasses
from trl_ext.gradients import GradientView
from trl_ext.records import SampleWeights, StreamGradient, TokenRecord, Window

Streams = Mapping[str, StreamGradient]


@dataclass(frozen=True)
class SampleWeighting:
    """Sums up the columns of each window of an SFT run, and counts and weighs its samples."""

    run: RunContext
    passes: ExtraPasses
    prepare: Callable[[Any], dict[str, Any]]
    """Puts a micro-batch on the device as TRL's training step does."""
    counted_ranks: int
    """Ranks that the window's label tokens are counted over."""

    def begin_window(self, model: nn.Module, window: AccumulationWindow, streams: Streams) -> None:
        """Fill in the window's totals, sequences and weights where a plugin has a use for them. Collective.

        It comes before the window's first forward; `streams` are those asked for before the window.
        """
        weighs = self.run.plugins.implements("sample_weights")
        adds = self.run.plugins.implements("auxiliary_losses")
        # Unmarked samples are refused at start-up if a plugin weighs them, and by auxiliary losses per sample.
        counts = (weighs or adds) and self.run.samples_marked()
        if not counts and not self.run.columns:
            return
        batches = [self.prepare(dict(batch)) for batch in window.micro_batches]
        if self.run.columns:
            window.column_totals = self._totals(batches)
        if not counts:
            return
        index, samples = sample_index(batches)
        if adds:
            window.sequences = self.run.sum_over_ranks(torch.tensor(float(samples), device=self.run.device))
        if not weighs:
            return
        if window.num_items is None:
            raise ValueError("sample weights need the window's token count, which this model's forward does not take")
        chosen = self._ask(self._record(model, window, batches, index, samples, streams), samples)
        if chosen is not None:
            weights = self._per_sample(chosen, window.num_items, batches, index)
            window.weights = [weights[i] for i in index]

    def _totals(self, batches: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """() float each: the columns' totals over the window, counted as its label tokens are."""
        of_batches = [column_totals(batch) for batch in batches]
        totals = {name: torch.stack([of_batch[name] for of_batch in of_batches]).sum() for name in of_batches[0]}
        if self.counted_ranks == 1:
            return totals
        summed = over_ranks(totals, self.run.sum_over_ranks)
        return {name: total / self.counted_ranks for name, total in summed.items()}

    def _ask(self, record: Window, samples: int) -> SampleWeights | None:
        """The owner's weights; ones where only other ranks weigh, None where no rank does."""
        guard = self.run.guard
        guard.settle()  # a "before" stream's selection may have failed, and the weights may come of collectives
        answer = guard.exclusive("sample_weights", None, check=_check(samples), window=record)
        # Whether weights are used must not depend on the rank, or the ranks would divide by different counts.
        if not guard.agree(answer is not None):
            return None
        return _as_weights(torch.ones(samples) if answer is None else answer)

    def _per_sample(
        self, chosen: SampleWeights, num_items: Tensor | int, batches: Sequence[Any], index: Sequence[Tensor]
    ) -> Tensor:
        """(samples,) float: the weights, with a denominator of their own as a factor."""
        weights = chosen.weights.detach().to(self.run.device, torch.float32)
        if chosen.denominator != "weighted":
            return weights
        masks = [batch["labels"][:, 1:] != -100 for batch in batches]
        total = torch.stack([(weights[i] * mask).sum() for i, mask in zip(index, masks, strict=True)]).sum()
        # Over all ranks, and from there to the ranks that `num_items` counts.
        total = self.run.sum_over_ranks(total) * self.counted_ranks / self.run.world_size
        # TRL goes on dividing by all label tokens, so the weights carry the ratio; all-zero weights stay zero.
        return weights * torch.where(total > 0, num_items / total, torch.zeros_like(total))

    def _record(
        self,
        model: nn.Module,
        window: AccumulationWindow,
        batches: Sequence[dict[str, Any]],
        index: Sequence[Tensor],
        samples: int,
        streams: Streams,
    ) -> Window:
        run, passes = self.run, self.passes
        assert window.num_items is not None, "refused before"
        denominator = label_tokens(window.num_items, self.counted_ranks, run.device)
        totals = window.column_totals or {}

        def tokens(module: nn.Module, i: int) -> TokenRecord:
            return token_record(run, passes.forward(module, batches[i]), batches[i], denominator, totals)

        # Local passes use the unwrapped model: nothing is reduced, so ranks need not make them alike.
        def forward(i: int) -> TokenRecord:
            with passes.aside():
                return tokens(passes.unwrapped(), i)

        def local_loss(i: int) -> Tensor:
            with passes.aside():
                return per_token_loss(run, tokens(passes.unwrapped(), i))

        def gradient(i: int, weights: Tensor | None = None) -> GradientView:
            def loss() -> Tensor:
                losses = per_token_loss(run, tokens(model, i))
                return (losses if weights is None else losses * weights[index[i]]).sum() / denominator

            run.guard.agree()
            return passes.gradient(model, loss)

        plain = [without_columns(batch) for batch in batches]
        columns = [with_columns(_unseen(batch), batch, run.columns).columns for batch in batches]
        return Window(plain, index, samples, run.step(), streams, forward, local_loss, gradient, columns)


def sample_index(batches: Sequence[Mapping[str, Any]]) -> tuple[list[Tensor], int]:
    """(B, T) long per micro-batch: the sample of each label, counted from 0 over the window; and how many there are."""
    index, samples = [], 0
    for batch in batches:
        record = _unseen(batch)
        index.append(record.sample_index + samples)
        samples += record.num_samples
    return index, samples


def _unseen(batch: Mapping[str, Any]) -> TokenRecord:
    """The record of a batch that no model has seen: which sample each label belongs to."""
    labels = batch["labels"][:, 1:]
    none = labels.new_zeros(labels.shape)
    return TokenRecord(none, none, none, True, none, 1, 0.0, inputs=batch)


def _check(samples: int) -> Callable[[SampleWeights | Tensor | None], None]:
    def check(answer: SampleWeights | Tensor | None) -> None:
        if answer is None:
            return
        chosen = _as_weights(answer)
        if chosen.weights.shape != (samples,):
            raise TypeError(f"returned weights of shape {tuple(chosen.weights.shape)}; expected ({samples},)")
        if chosen.denominator == "weighted" and bool((chosen.weights < 0).any()):
            raise ValueError("returned negative weights, which have no weighted mean; use denominator='tokens'")

    return check


def _as_weights(answer: SampleWeights | Tensor) -> SampleWeights:
    return answer if isinstance(answer, SampleWeights) else SampleWeights(answer)
