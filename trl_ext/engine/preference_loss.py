"""The loss of DPO and KTO with the auxiliary losses of plugins: TRL's `compute_loss`, with a stand-in for the model.

The stand-in notes what the model gives for the batch, so that there is no second forward. TRL runs the reference
by another way (`ref_model`, or the model itself with another adapter), which the stand-in does not see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trl_ext.engine.context import AccumulationWindow, RunContext
from trl_ext.engine.losses import add_auxiliary_losses
from trl_ext.records import MicroStep


@dataclass(frozen=True)
class PreferenceLoss:
    """What plugins make of TRL's `compute_loss` in training."""

    run: RunContext
    window: AccumulationWindow

    def loss(
        self,
        compute_loss: Callable[..., Any],
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool,
        num_items: Tensor | int | None,
    ) -> Any:
        """The micro-batch's loss, with the outputs where they are asked for: TRL's `compute_loss` and its arguments."""
        if not self.run.training() or not self.run.plugins.implements("auxiliary_losses"):
            return compute_loss(model, inputs, return_outputs, num_items)
        tap = _PolicyTap(model)
        result = compute_loss(tap, inputs, return_outputs, num_items)
        loss, rest = (result[0], result[1:]) if return_outputs else (result, ())
        loss = self._with_auxiliary(loss, inputs, tap.outputs)
        return (loss, *rest) if return_outputs else loss

    def _with_auxiliary(self, loss: Tensor, inputs: Mapping[str, Any], outputs: Any) -> Tensor:
        run, window = self.run, self.window
        mask = completion_labels(inputs)
        labels = mask.size(1)  # prompt learning puts virtual tokens in front
        if window.tokens is None:
            self._count()
        assert window.tokens is not None, "counted above"
        assert window.sequences is not None, "counted above"
        micro_step = MicroStep(
            inputs=inputs,
            log_probs=outputs.log_probs[:, -labels:],
            entropy=outputs.entropy[:, -labels:],
            mask=mask,
            step=run.step(),
            progress=run.progress(),
        )
        return add_auxiliary_losses(
            run,
            loss,
            micro_step,
            per_token=window.tokens / run.world_size,
            per_sequence=window.sequences / run.world_size,
            per_batch=run.accumulation_steps(),
            divided_later=run.accumulation_steps(),
        )

    def _count(self) -> None:
        """Fill in the window's label tokens and rows over all ranks. Collective."""
        masks = [completion_labels(batch) for batch in self.window.micro_batches]
        tokens = torch.stack([mask.sum() for mask in masks]).sum().to(self.run.device, torch.float32)
        rows = torch.tensor(float(sum(map(len, masks))), device=self.run.device)
        counts = self.run.sum_over_ranks(torch.stack([tokens, rows])).clamp(min=1)
        self.window.tokens, self.window.sequences = counts.unbind()


def completion_labels(batch: Mapping[str, Any]) -> Tensor:
    """(B, T) bool: the label tokens of a batch of TRL's, which are those of the completions."""
    mask: Tensor = batch["completion_mask"]
    return mask[:, 1:].bool()


@dataclass
class _PolicyTap:
    """Stands in for the model in TRL's `compute_loss`, and keeps the outputs of the forward that is trained on.

    KTO runs the model on mismatched completions too, without a gradient, and before.
    """

    model: nn.Module
    outputs: Any = field(default=None, init=False)

    def __call__(self, **inputs: Any) -> Any:
        self.outputs = self.model(**inputs)
        return self.outputs
