"""Entropy of the likeliest tokens, renormalised: what EAFT's gate is made of, and TRL's fused head does not give."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from trl_ext_objectives.backbone import BackboneTap, refuse_rescaled_logits, refuse_unreadable_states

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import RunDescription, SetupContext, TokenRecord

POSITIONS_AT_ONCE = 256
"""Label positions that are projected at once: with a vocabulary of 150,000, 150 MB of fp32 logits."""


def top_entropy(logits: Tensor, count: int) -> Tensor:
    """Entropy in nats of the softmax over the `count` largest of the logits (..., V), as (...) float.

    Log-probabilities serve as logits as well as any.
    """
    log_probs = logits.topk(min(count, logits.shape[-1]), dim=-1).values.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


class TopEntropy:
    """Projects the hidden states of each micro-batch once more, without gradient, some positions at a time.

    Args:
        count: Number of tokens.
        reader: Who asks, and `instead` what the user can do where it is impossible; for messages.
    """

    def __init__(self, count: int, reader: str, instead: str) -> None:
        self._count, self._reader, self._instead = count, reader, instead
        self._tap: BackboneTap | None = None

    def check(self, run: RunDescription) -> None:
        """Refuse what splits or replaces the LM head."""
        refuse_unreadable_states(run, self._reader, self._instead)

    def setup(self, context: SetupContext) -> None:
        """Listen to the backbone."""
        refuse_rescaled_logits(context.model, self._reader, self._instead)
        if self._tap is not None:
            self._tap.handle.remove()
        self._tap = BackboneTap(context.model)

    @torch.no_grad()
    def per_token(self, tokens: TokenRecord) -> Tensor:
        """(B, T) in nats, of the dtype of `entropy` and without gradient; 0 where the mask is False.

        Where the record holds the whole distribution, as that of a picture does, it is taken from there.
        """
        if "log_softmax" in tokens.extras:
            return top_entropy(tokens.extras["log_softmax"], self._count)
        if self._tap is None:
            raise RuntimeError(
                f"{self._reader} listens to the model from the start of training on; call train() before evaluate(), "
                f"or {self._instead}"
            )
        hidden, (weight, bias) = self._tap.take()[tokens.mask], self._tap.head()
        with self._tap.autocast():
            logits = (functional.linear(part, weight, bias) for part in hidden.split(POSITIONS_AT_ONCE))
            parts = [top_entropy(part.float(), self._count) for part in logits]
        return torch.zeros_like(tokens.entropy).masked_scatter(tokens.mask, torch.cat(parts).to(tokens.entropy.dtype))
