"""What the loss hooks receive, and how their results enter TRL's loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trl_ext.records import AuxiliaryLoss, MicroStep, TokenRecord

if TYPE_CHECKING:
    from trl_ext.trainers.mixin import TrainerMixin


def token_record(
    trainer: TrainerMixin, outputs: Any, inputs: Mapping[str, Any], denominator: Tensor, stream: str | None = None
) -> TokenRecord:
    """What `per_token_loss` receives for the outputs of TRL's fused head.

    Args:
        trainer: the trainer.
        outputs: TRL's `FusedCausalLMOutput`.
        inputs: the micro-batch.
        denominator: () what the sum of the losses is divided by on this rank.
        stream: name of the stream that the batch is of.
    """
    training = trainer.model.training
    own_step = training and stream is None
    return TokenRecord(
        log_probs=outputs.log_probs,
        entropy=outputs.entropy,
        mask=outputs.label_mask,
        training=training,
        denominator=denominator,
        accumulation_steps=trainer.current_gradient_accumulation_steps if own_step else 1,
        progress=trainer.ext_progress(),
        stream=stream,
        extras={name: outputs[name] for name in trainer.ext_fused_outputs},
        inputs=inputs,
    )


def add_auxiliary_losses(
    trainer: TrainerMixin,
    loss: Tensor,
    micro_step: MicroStep,
    *,
    per_token: Tensor | float,
    per_sequence: Tensor | float,
    per_batch: float,
) -> Tensor:
    """Add every plugin's named terms to a micro-step's loss, and note their values for the log.

    The denominators are those seen from one rank: after averaging over ranks and adding over the window, a term is the
    mean over the window's label tokens or samples on all ranks, or the mean of the micro-batches' values.

    Raises:
        PluginError: a plugin returns anything but a mapping of names to scalar `AuxiliaryLoss`.
    """
    denominators = {"token": per_token, "sequence": per_sequence, "batch": per_batch}

    def check(terms: Mapping[str, AuxiliaryLoss]) -> None:
        for name, term in terms.items():
            if not isinstance(term, AuxiliaryLoss) or term.value.ndim or term.per not in denominators:
                raise TypeError(f"term '{name}' is {term!r}; expected AuxiliaryLoss(scalar, per)")

    terms = trainer.ext_guard.sum("auxiliary_losses", check=check, micro_step=micro_step)
    for name, term in terms.items():
        value = term.value / denominators[term.per]
        loss = loss + value
        trainer.ext_tally.add_term(name, value)
    return loss
