"""`KL(p_ref || p)` over the whole vocabulary at each label position, without building logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from trl_ext.own_passes import inference_only
from trl_ext_objectives.backbone import BackboneTap, refuse_rescaled_logits, refuse_unreadable_states
from trl_ext_objectives.live_reference import LiveReference

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import RunDescription, SetupContext, TokenRecord

_NOT_OF_BACKBONE = ("labels", "fused_lm_head", "output_router_logits", "use_cache")


def tiled_kl(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ref_hidden: Tensor, ref_weight: Tensor, ref_bias: Tensor | None
) -> Tensor:
    """`KL(p_ref || p)` of the next-token distributions, in nats, by TRL's tiled kernel; the gradient flows to p.

    Args:
        hidden: (N, H) hidden states.
        weight: (V, H) of the LM head.
        bias: (V,) of the LM head, or None.
        ref_hidden: (N, H_ref) of the reference, whose head is `ref_weight` and `ref_bias`.

    Returns:
        (N,) float32.
    """
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    forward_kl = 0.0
    divergence, _ = ChunkedDivergenceFunction.apply(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, forward_kl)
    return cast("Tensor", divergence)


class ReferenceDivergence:
    """Runs the reference's backbone on each micro-batch and compares its distributions with the model's.

    It costs one forward of the reference's backbone, and two more passes of each LM head over the label tokens.

    Args:
        reference: The model to compare with.
        reader: Name of the plugin, for messages.
    """

    def __init__(self, reference: LiveReference, reader: str) -> None:
        self._reference, self._reader = reference, reader
        self._tap: BackboneTap | None = None
        self._ref_tap: BackboneTap | None = None

    def check(self, run: RunDescription) -> None:
        """Refuse what splits or replaces the LM head."""
        refuse_unreadable_states(run, self._reader, "use another objective")

    def setup(self, context: SetupContext) -> None:
        """Listen to both backbones; the reference has been set up before."""
        refuse_rescaled_logits(context.model, self._reader)
        for tap in {self._tap, self._ref_tap} - {None}:
            cast("BackboneTap", tap).handle.remove()
        self._tap = BackboneTap(context.model)
        own = self._reference.ready() is context.model
        self._ref_tap = self._tap if own else BackboneTap(self._reference.ready())

    def per_token(self, tokens: TokenRecord) -> Tensor:
        """(B, T) in nats, of the dtype of `log_probs`; 0 where the mask is False."""
        if self._tap is None or self._ref_tap is None:
            raise RuntimeError("the reference is taken when training starts; call train() before evaluate()")
        hidden = self._tap.take()[tokens.mask]
        ref_hidden, ref_weight, ref_bias = self._of_reference(tokens, self._tap, self._ref_tap)
        weight, bias = self._tap.head()
        with self._tap.autocast():
            kl = tiled_kl(hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
        return torch.zeros_like(tokens.log_probs).masked_scatter(tokens.mask, kl.to(tokens.log_probs.dtype))

    def _of_reference(
        self, tokens: TokenRecord, tap: BackboneTap, ref_tap: BackboneTap
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states (N, H_ref) of the label positions under the reference, and its LM head."""
        inputs: dict[str, Any] = {k: v for k, v in tokens.inputs.items() if k not in _NOT_OF_BACKBONE}
        with self._reference.active():
            with inference_only(self._reference.ready()), tap.autocast():
                ref_tap.backbone(**inputs, use_cache=False)
            # Detached inside: outside, the parameter holds the trained weight again.
            weight, bias = ref_tap.head()
            return ref_tap.take()[tokens.mask], weight.detach(), None if bias is None else bias.detach()
