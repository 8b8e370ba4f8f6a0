"""A loss that looks at a model's and a reference's distributions over the whole vocabulary, without building logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from trl_ext.own_passes import inference_only
from trl_ext_objectives.backbone import BackboneTap, refuse_rescaled_logits, refuse_split_head
from trl_ext_objectives.live_reference import LiveReference
from trl_ext_objectives.two_heads import Head, nll_and_kl

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import RunDescription, SetupContext, TokenRecord

_NOT_OF_BACKBONE = ("labels", "fused_lm_head", "output_router_logits", "use_cache")


class ReferenceDivergence:
    """Runs the reference's backbone on each micro-batch and compares its distributions with the model's.

    It costs one forward of the reference, its LM head over the label tokens alone, and one more forward of the model's
    LM head: the backward pass of TRL's is left out, since nothing depends on its log-probabilities.

    Args:
        reference: The model to compare with.
        reader: Name of the plugin, for messages.
    """

    def __init__(self, reference: LiveReference, reader: str) -> None:
        self._reference, self._reader = reference, reader
        self._tap: BackboneTap | None = None
        self._ref_tap: BackboneTap | None = None

    def check(self, run: RunDescription) -> None:
        """Refuse what splits the LM head."""
        refuse_split_head(run, self._reader, "use another objective")

    def setup(self, context: SetupContext) -> None:
        """Listen to both backbones; the reference has been set up before."""
        refuse_rescaled_logits(context.model, self._reader)
        refuse_rescaled_logits(self._reference.ready(), self._reader, "take another reference")
        for tap in {self._tap, self._ref_tap} - {None}:
            cast("BackboneTap", tap).handle.remove()
        self._tap = BackboneTap(context.model)
        own = self._reference.ready() is context.model
        self._ref_tap = self._tap if own else BackboneTap(self._reference.ready())

    def added_to_nll(self, tokens: TokenRecord, nll_weights: Tensor, kl_weight: float) -> Tensor:
        """`nll_weights NLL + kl_weight KL(p_ref || p)`: (B, T) in nats, of the dtype of `log_probs`, 0 without a label.

        Args:
            tokens: the micro-batch.
            nll_weights: (B, T) float, at least 0; gets no gradient.
            kl_weight: at least 0.
        """
        if self._tap is None or self._ref_tap is None:
            raise RuntimeError("the reference is taken when training starts; call train() before evaluate()")
        mask = tokens.mask
        model = Head(self._tap.take()[mask], *self._tap.head())
        reference = self._of_reference(tokens, self._tap, self._ref_tap)
        labels = tokens.inputs["labels"][:, 1:][mask]
        with self._tap.autocast():
            loss = nll_and_kl(model, reference, labels, nll_weights[mask], kl_weight)
        return torch.zeros_like(tokens.log_probs).masked_scatter(mask, loss.to(tokens.log_probs.dtype))

    def _of_reference(self, tokens: TokenRecord, tap: BackboneTap, ref_tap: BackboneTap) -> Head:
        """Hidden states (N, H_ref) of the label positions under the reference, and its LM head."""
        inputs: dict[str, Any] = {k: v for k, v in tokens.inputs.items() if k not in _NOT_OF_BACKBONE}
        with self._reference.active():
            with inference_only(self._reference.ready()), tap.autocast():
                ref_tap.backbone(**inputs, use_cache=False)
            # Detached inside: outside, the parameter holds the trained weight again.
            weight, bias = ref_tap.head()
            return Head(ref_tap.take()[tokens.mask], weight.detach(), None if bias is None else bias.detach())
