"""`SFTTrainer`: TRL's, with the objective, the sample weights and auxiliary losses open to plugins."""

from __future__ import annotations

from typing import Any

import torch
import trl
from torch import Tensor, nn
from trl.trainer.utils import add_fused_lm_head

from trl_ext.config import SFTConfig
from trl_ext.engine.losses import add_auxiliary_losses, token_record
from trl_ext.engine.passes import fused_forward, gradient_of, standing_aside
from trl_ext.gradients import GradientView
from trl_ext.records import MicroStep, SampleWeights, TokenRecord, Window
from trl_ext.trainers.mixin import TrainerMixin


class SFTTrainer(TrainerMixin, trl.SFTTrainer):
    """Drop-in for `trl.SFTTrainer` with the hook points of `trl_ext.hookspecs`.

    The objective works on the per-token log-probabilities of TRL's fused LM head: no logits are built and there is no
    second forward. Give it as for TRL, and in addition:

    Args:
        plugins: instances to activate after those that `args.plugins` names.
        streams: role to auxiliary data set, in addition to those that `args.streams` names.
    """

    ext_kind = "sft"
    ext_config_class = SFTConfig

    _ext_sample_weights: list[Tensor] | None = None
    _ext_window_sequences: Tensor

    def _ext_add_fused_outputs(self) -> None:
        if self.ext_fused_outputs:
            outputs = dict.fromkeys(("log_probs", "entropy", "is_top1", *self.ext_fused_outputs))
            add_fused_lm_head(self.ext_base_model(), outputs=tuple(outputs))

    # -- loss --------------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if not self.ext_plugins:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        weights = None
        if self.model.training and self._ext_sample_weights is not None:
            weights = self._ext_sample_weights[self.ext_micro_step]
        tap = _LossTap(self, model, num_items_in_batch, weights)
        result = super().compute_loss(tap, inputs, return_outputs, num_items_in_batch)
        if not self.ext_plugins.implements("auxiliary_losses") or not self.model.training:
            return result
        loss, rest = (result[0], result[1:]) if return_outputs else (result, ())
        step = MicroStep(
            inputs=inputs,
            log_probs=tap.tokens.log_probs,
            entropy=tap.tokens.entropy,
            mask=tap.tokens.mask,
            step=self.state.global_step,
            progress=self.ext_progress(),
        )
        later = self._ext_divided_later(num_items_in_batch)
        loss = add_auxiliary_losses(
            self,
            loss,
            step,
            per_token=tap.tokens.denominator / later,
            per_sequence=self._ext_window_sequences / self.accelerator.num_processes / later,
            per_batch=self.current_gradient_accumulation_steps / later,
        )
        return (loss, *rest) if return_outputs else loss

    def ext_denominator(self, num_items: Tensor | int | None, mask: Tensor) -> Tensor:
        """() what TRL divides the sum of this micro-batch's losses by, seen from this rank after DDP's averaging."""
        if num_items is None:
            return mask.sum().clamp(min=1) * self._ext_divided_later(num_items)
        items = torch.as_tensor(num_items, device=mask.device).clamp(min=1)
        return items / self.accelerator.num_processes if self.args.average_tokens_across_devices else items

    def _ext_divided_later(self, num_items: Tensor | int | None) -> int:
        """What transformers divides the loss by after `compute_loss`: without a token count, the micro-batches."""
        return self.current_gradient_accumulation_steps if num_items is None and self.model.training else 1

    # -- sample weights ----------------------------------------------------------------------------------------------

    def ext_begin_window(self, model: nn.Module) -> None:
        super().ext_begin_window(model)
        self._ext_sample_weights = None
        wants_weights = self.ext_plugins.implements("sample_weights")
        if not wants_weights and not self.ext_plugins.implements("auxiliary_losses"):
            return
        batches = [self._prepare_inputs(dict(batch)) for batch in self.ext_window]
        index = _window_index(batches)
        local = int(max(int(i.max()) for i in index)) + 1
        count = torch.tensor(float(local), device=self.accelerator.device)
        self._ext_window_sequences = self.accelerator.reduce(count, reduction="sum")
        if wants_weights:
            self._ext_weigh(model, batches, index, local)

    def _ext_weigh(self, model: nn.Module, batches: list[dict[str, Any]], index: list[Tensor], samples: int) -> None:
        if self.ext_num_items is None:
            raise ValueError("sample weights need the window's token count, which this model's forward does not take")

        def record(module: nn.Module, i: int) -> TokenRecord:
            outputs = fused_forward(self, module, batches[i])
            denominator = self.ext_denominator(self.ext_num_items, outputs.label_mask)
            return token_record(self, outputs, batches[i], denominator)

        # Local passes use the unwrapped model: nothing is reduced, so ranks need not make them alike.
        def forward(i: int) -> TokenRecord:
            with standing_aside(self):
                return record(self.model, i)

        def per_token_loss(i: int) -> Tensor:
            with standing_aside(self):
                return self.ext_per_token_loss(record(self.model, i))

        def gradient(i: int, weights: Tensor | None = None) -> GradientView:
            def loss() -> Tensor:
                tokens = record(model, i)
                losses = self.ext_per_token_loss(tokens)
                if weights is not None:
                    losses = losses * weights[index[i]]
                return losses.sum() / tokens.denominator

            self.ext_guard.agree()
            return gradient_of(self, model, loss)

        window = Window(
            micro_batches=batches,
            sample_index=index,
            num_samples=samples,
            step=self.state.global_step,
            streams=self._ext_before,
            forward=forward,
            per_token_loss=per_token_loss,
            gradient=gradient,
        )

        def check(result: SampleWeights | Tensor | None) -> None:
            if result is None:
                return
            chosen = result if isinstance(result, SampleWeights) else SampleWeights(result)
            if chosen.weights.shape != (samples,):
                raise TypeError(f"returned weights of shape {tuple(chosen.weights.shape)}; expected ({samples},)")
            if chosen.denominator == "weighted" and bool((chosen.weights < 0).any()):
                raise ValueError("returned negative weights, which have no weighted mean; use denominator='tokens'")

        chosen = self.ext_guard.exclusive("sample_weights", None, check=check, window=window)
        self.ext_guard.agree()
        chosen = SampleWeights(chosen) if isinstance(chosen, Tensor) else chosen
        # Whether weights are used must not depend on the rank, or the ranks would divide by different counts.
        used = torch.tensor(float(chosen is not None), device=self.accelerator.device)
        if self.accelerator.reduce(used, reduction="sum").item() > 0:
            self._ext_apply_weights(chosen or SampleWeights(torch.ones(samples)), batches, index)

    def _ext_apply_weights(self, chosen: SampleWeights, batches: list[dict[str, Any]], index: list[Tensor]) -> None:
        weights = chosen.weights.detach().to(self.accelerator.device, torch.float32)
        if chosen.denominator == "weighted":
            masks = [batch["labels"][:, 1:] != -100 for batch in batches]
            total = torch.stack([(weights[i] * m).sum() for i, m in zip(index, masks, strict=True)]).sum()
            total = self.accelerator.reduce(total, reduction="sum")
            # TRL goes on dividing by all label tokens, so the weights carry the ratio; all-zero weights stay zero.
            weights = weights * torch.where(total > 0, self.ext_num_items / total, torch.zeros_like(total))
        self._ext_sample_weights = [weights[i] for i in index]


class _LossTap:
    """Stands in for the model in TRL's `compute_loss`, and puts the objective where TRL reads the log-probabilities.

    TRL sums `-log_probs` and divides by the window's tokens; with `log_probs` replaced by minus the objective's loss
    the whole of TRL's reduction, metrics and MoE loss stays as it is.
    """

    def __init__(
        self, trainer: SFTTrainer, model: nn.Module, num_items: Tensor | int | None, weights: Tensor | None
    ) -> None:
        self.trainer = trainer
        self.model = model
        self.num_items = num_items
        self.weights = weights
        self.tokens: TokenRecord

    def __call__(self, **inputs: Any) -> Any:
        outputs = self.model(**inputs)
        if not inputs.get("fused_lm_head"):
            return outputs
        trainer = self.trainer
        denominator = trainer.ext_denominator(self.num_items, outputs.label_mask)
        self.tokens = token_record(trainer, outputs, inputs, denominator)
        mode = "train" if trainer.model.training else "eval"
        trainer.ext_tally.add_tokens(mode, outputs.log_probs, outputs.label_mask)
        if trainer.ext_plugins.implements("per_token_loss") or self.weights is not None:
            loss = trainer.ext_per_token_loss(self.tokens)
            outputs.log_probs = -(loss if self.weights is None else loss * self.weights)
        return outputs


def _window_index(batches: list[dict[str, Any]]) -> list[Tensor]:
    """(B, T) long per micro-batch: the sample that each label belongs to, counted over the whole window."""
    index, offset = [], 0
    for batch in batches:
        labels = batch["labels"][:, 1:]
        none = labels.new_zeros(labels.shape)
        record = TokenRecord(none, none, none, True, none, 1, 0.0, inputs=batch)
        index.append(record.sample_index + offset)
        offset += record.num_samples
    return index


__all__ = ["SFTTrainer"]
