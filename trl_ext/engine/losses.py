"""What the loss hooks receive, and how their results enter TRL's loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trl_ext.engine.columns import with_columns, without_columns
from trl_ext.engine.context import RunContext
from trl_ext.engine.fused_head import head_outputs
from trl_ext.records import AuxiliaryLoss, MicroStep, TokenRecord


def token_record(
    run: RunContext,
    outputs: Any,
    batch: Mapping[str, Any],
    denominator: Tensor,
    totals: Mapping[str, Tensor],
    stream: str | None = None,
) -> TokenRecord:
    """What `per_token_loss` receives for a batch with its columns and TRL's `FusedCausalLMOutput` of it (`outputs`).

    `denominator` is () what the sum of the losses is divided by on this rank, `totals` its `column_totals`; `stream`
    names the stream of the batch.
    """
    own_step = run.training() and stream is None
    tokens = TokenRecord(
        log_probs=outputs.log_probs,
        entropy=outputs.entropy,
        mask=outputs.label_mask,
        training=run.training(),
        denominator=denominator,
        accumulation_steps=run.accumulation_steps() if own_step else 1,
        progress=run.progress(),
        stream=stream,
        extras=head_outputs(outputs, run.fused_outputs),
        inputs=without_columns(batch),
        samples_marked=stream is not None or run.samples_marked(),  # streams are not packed
        column_totals=totals,
    )
    return with_columns(tokens, batch, run.columns)


def label_tokens(num_items: Tensor | int, counted_ranks: int, device: torch.device) -> Tensor:
    """() float: a window's label tokens, at least one, as seen from a rank whose gradients are averaged with others'.

    `num_items` is transformers' count, over all ranks or, with `counted_ranks` = 1, of this rank alone.
    """
    return torch.as_tensor(num_items, device=device).clamp(min=1) / counted_ranks


def per_token_loss(run: RunContext, tokens: TokenRecord) -> Tensor:
    """(B, T) the objective's loss, 0 without a label: the owner's, or the negative log-probability."""
    nll = -tokens.log_probs
    if not run.plugins.implements("per_token_loss"):
        return nll
    loss = run.guard.exclusive("per_token_loss", nll, check=token_loss_check(nll), tokens=tokens)
    # `where`, not a product: a loss may be infinite at masked positions, where the log-probability reads 0.
    return torch.where(tokens.mask, loss, torch.zeros_like(loss))


def token_loss_check(log_probs: Tensor) -> Callable[[Any], None]:
    """A check that a loss hook has returned one number per token, which can be trained on where `log_probs` can."""

    def check(loss: Any) -> None:
        if not isinstance(loss, Tensor) or loss.shape != log_probs.shape:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"returned {got}; expected a loss of shape {tuple(log_probs.shape)}")
        _refuse_untrainable(loss, log_probs)

    return check


def _refuse_untrainable(loss: Tensor, log_probs: Tensor) -> None:
    """Raise for a loss that autograd, or the sum with TRL's own loss, could not take."""
    if not loss.is_floating_point():
        raise TypeError(f"returned a loss of {loss.dtype}; compute it in a floating-point dtype")
    if loss.device != log_probs.device:
        raise TypeError(f"returned a loss on {loss.device}; the model's log-probabilities are on {log_probs.device}")
    if log_probs.requires_grad and not loss.requires_grad:
        raise TypeError(
            "returned a loss that is detached from the model, so nothing would be trained; compute it from log_probs "
            "without detach(), item() or no_grad(), and where it has to be zero, return 0 * log_probs"
        )


def add_auxiliary_losses(
    run: RunContext,
    loss: Tensor,
    micro_step: MicroStep,
    *,
    per_token: Tensor | float | str,
    per_sequence: Tensor | float | str,
    per_batch: float,
    divided_later: int = 1,
) -> Tensor:
    """Add every plugin's named terms to a micro-step's loss, and note their values for the log.

    The denominators are those seen from one rank: after averaging over ranks and adding over the window, a term is the
    mean over the window's label tokens or samples on all ranks, or the mean of the micro-batches' values. A text in
    place of a denominator says why this run does not know it, and what to change. `divided_later` is what transformers
    divides the micro-step's loss by afterwards: the micro-batches of the window, in trainers that leave that to it.

    Raises:
        PluginError: a plugin returns anything but a mapping of names to scalar `AuxiliaryLoss` with a gradient, or a
            term per something that is not known.
    """
    denominators = {"token": per_token, "sequence": per_sequence, "batch": per_batch}

    def check(terms: Mapping[str, AuxiliaryLoss]) -> None:
        for name, term in terms.items():
            scalar = isinstance(term, AuxiliaryLoss) and isinstance(term.value, Tensor) and not term.value.ndim
            if not scalar or term.per not in denominators:
                raise TypeError(f"term '{name}' is {term!r}; expected AuxiliaryLoss(scalar, per)")
            if isinstance(reason := denominators[term.per], str):
                raise ValueError(f"term '{name}' is per {term.per}, but {reason}")
            _refuse_untrainable(term.value, micro_step.log_probs)

    terms = run.guard.sum("auxiliary_losses", check=check, micro_step=micro_step)
    for name, term in terms.items():
        denominator = denominators[term.per]
        assert not isinstance(denominator, str), "refused by the check"
        value = term.value / denominator
        loss = loss + value * divided_later
        run.tally.add_term(name, value)
    return loss
