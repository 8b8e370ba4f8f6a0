"""The SFT loss of one micro-batch: the objective, the sample weights and auxiliary losses, inside of TRL's own loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from trl_ext.engine.columns import column_totals, without_columns
from trl_ext.engine.context import AccumulationWindow, RunContext
from trl_ext.engine.losses import add_auxiliary_losses, label_tokens, per_token_loss, token_record
from trl_ext.records import MicroStep, TokenRecord
from trl_ext.records.tokens import UNMARKED


@dataclass(frozen=True)
class SFTLoss:
    """What plugins make of TRL's `compute_loss`, in training and evaluation."""

    run: RunContext
    window: AccumulationWindow
    counted_ranks: int
    """Ranks that the window's label tokens are counted over."""

    def loss(
        self,
        compute_loss: Callable[..., Any],
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool,
        num_items: Tensor | int | None,
    ) -> Any:
        """The micro-batch's loss, with the outputs where they are asked for: TRL's `compute_loss` and its arguments."""
        training = self.run.training()
        weights = self.window.weights[self.window.done] if training and self.window.weights is not None else None
        tap = _ModelTap(self, model, num_items, weights)
        result = compute_loss(tap, inputs, return_outputs, num_items)
        if not training or not self.run.plugins.implements("auxiliary_losses"):
            return result
        loss, rest = (result[0], result[1:]) if return_outputs else (result, ())
        loss = self._with_auxiliary(loss, inputs, tap.tokens, num_items)
        return (loss, *rest) if return_outputs else loss

    def _with_auxiliary(
        self, loss: Tensor, inputs: dict[str, Any], tokens: TokenRecord, num_items: Tensor | int | None
    ) -> Tensor:
        run = self.run
        micro_step = MicroStep(
            inputs=without_columns(inputs),
            log_probs=tokens.log_probs,
            entropy=tokens.entropy,
            mask=tokens.mask,
            step=run.step(),
            progress=run.progress(),
            columns=tokens.columns,
        )
        sequences = self.window.sequences
        return add_auxiliary_losses(
            run,
            loss,
            micro_step,
            per_token=tokens.denominator,
            per_sequence=UNMARKED if sequences is None else sequences / run.world_size,
            per_batch=run.accumulation_steps(),
            divided_later=self._divided_later(num_items),
        )

    def denominator(self, num_items: Tensor | int | None, mask: Tensor) -> Tensor:
        """() what TRL divides the sum of this micro-batch's losses by, seen from this rank after DDP's averaging."""
        if num_items is None:
            return mask.sum().clamp(min=1) * self._divided_later(num_items)
        return label_tokens(num_items, self.counted_ranks, mask.device)

    def column_totals(self, num_items: Tensor | int | None, batch: dict[str, Any]) -> Mapping[str, Tensor]:
        """() float each: the columns' totals over what `denominator` counts the tokens of."""
        if num_items is not None and self.window.column_totals is not None and self.run.training():
            return self.window.column_totals
        return {name: total * self._divided_later(num_items) for name, total in column_totals(batch).items()}

    def _divided_later(self, num_items: Tensor | int | None) -> int:
        """What transformers divides the loss by after `compute_loss`: without a token count, the micro-batches."""
        return self.run.accumulation_steps() if num_items is None and self.run.training() else 1


@dataclass
class _ModelTap:
    """Stands in for the model in TRL's `compute_loss`, and puts the objective where TRL reads the log-probabilities.

    TRL sums `-log_probs` and divides by the window's tokens; with `log_probs` replaced by minus the objective's loss
    the whole of TRL's reduction, metrics and MoE loss stays as it is.
    """

    owner: SFTLoss
    model: nn.Module
    num_items: Tensor | int | None
    weights: Tensor | None
    tokens: TokenRecord = field(init=False)

    def __call__(self, **inputs: Any) -> Any:
        outputs = self.model(**without_columns(inputs))
        if not inputs.get("fused_lm_head"):
            return outputs
        run = self.owner.run
        denominator = self.owner.denominator(self.num_items, outputs.label_mask)
        totals = self.owner.column_totals(self.num_items, inputs)
        self.tokens = token_record(run, outputs, inputs, denominator, totals)
        run.tally.add_tokens("train" if run.training() else "eval", outputs.log_probs, outputs.label_mask)
        if run.plugins.implements("per_token_loss") or self.weights is not None:
            loss = per_token_loss(run, self.tokens)
            outputs.log_probs = -(loss if self.weights is None else loss * self.weights)
        return outputs
