"""ASFT: DFT, anchored to a reference by the KL divergence over the whole vocabulary, without building logits."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from trl_ext import hookimpl
from trl_ext_objectives.dft import DFT, dft_loss
from trl_ext_objectives.head import BackboneTap, refuse_rescaled_logits
from trl_ext_objectives.reference import LiveReference, scoring
from trl_ext_objectives.reference_objective import ReferenceObjective
from trl_ext_objectives.schedule import NON_NEGATIVE

if TYPE_CHECKING:
    from trl_ext.records import RunDescription, SetupContext, TokenRecord

_NOT_OF_BACKBONE = ("labels", "fused_lm_head", "output_router_logits", "use_cache")


def reference_kl(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ref_hidden: Tensor, ref_weight: Tensor, ref_bias: Tensor | None
) -> Tensor:
    """`KL(p_ref || p)` of the next-token distributions, in nats, by TRL's tiled kernel; the gradient flows to p.

    Args:
        hidden, ref_hidden: (N, H) hidden states.
        weight, ref_weight: (V, H) of the LM heads; bias, ref_bias: (V,) or None.

    Returns:
        (N,) float32.
    """
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    forward_kl = 0.0
    divergence, _ = ChunkedDivergenceFunction.apply(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, forward_kl)
    return cast(Tensor, divergence)


@dataclass(eq=False)
class ASFT(ReferenceObjective):
    """Anchored SFT: `DFT + beta KL(p_ref || p)` per label token.

    Costs one forward of the reference's backbone, and two more passes of each LM head over the label tokens.

    Args:
        reference: `start`, `base` or `model:PATH`; a cache holds no distributions.
        beta: Weight of the divergence, at least 0, or a schedule.
    """

    citation: ClassVar[str] = "Anchored Supervised Fine-Tuning, arXiv 2509.23753"
    ranges = {"beta": NON_NEGATIVE}
    mixable = False

    reference: str = "start"
    beta: float | str = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self._reference, LiveReference):
            raise ValueError(
                f"ASFT: reference={self.reference!r} holds log-probabilities of labels only, and the divergence is "
                "over the whole vocabulary; use reference='start', 'base' or 'model:PATH'"
            )
        self._live: LiveReference = self._reference
        self._tap: BackboneTap | None = None
        self._ref_tap: BackboneTap | None = None

    @hookimpl
    def check(self, run: RunDescription) -> None:
        """Refuse what splits or replaces the LM head."""
        if run.trainer == "grpo":
            raise ValueError("asft reads the hidden states of SFT's own forward; in GRPO use another objective")
        if run.sharding not in ("none", "ddp"):
            raise ValueError(f"asft projects with the LM head itself, whose weight {run.sharding} splits up")
        super().check(run)

    @hookimpl
    def setup(self, context: SetupContext) -> None:
        """Take the reference, and listen to both backbones."""
        super().setup(context)
        refuse_rescaled_logits(context.model, "asft")
        for tap in {self._tap, self._ref_tap} - {None}:
            cast(BackboneTap, tap).handle.remove()
        self._tap = BackboneTap(context.model)
        own = self._live.ready() is context.model
        self._ref_tap = self._tap if own else BackboneTap(self._live.ready())

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T)."""
        if self._tap is None or self._ref_tap is None:
            raise RuntimeError("the reference is taken when training starts; call train() before evaluate()")
        hidden, head = self._tap.take()[tokens.mask], self._tap.head
        inputs: dict[str, Any] = {k: v for k, v in tokens.inputs.items() if k not in _NOT_OF_BACKBONE}
        with self._live.active():
            with scoring(self._live.ready()), self._tap.autocast():
                self._ref_tap.backbone(**inputs, use_cache=False)
            ref_hidden = self._ref_tap.take()[tokens.mask]
            # Detached inside: outside, the parameter holds the trained weight again.
            ref_weight, ref_bias = (None if t is None else t.detach() for t in _parts(self._ref_tap.head))
        weight, bias = _parts(head)
        with self._tap.autocast():
            kl = reference_kl(hidden, cast(Tensor, weight), bias, ref_hidden, cast(Tensor, ref_weight), ref_bias)
        loss = dft_loss(tokens.log_probs)
        return loss + self.now("beta", tokens) * torch.zeros_like(loss).masked_scatter(tokens.mask, kl.to(loss.dtype))

    def draw(self, path: str | PathLike[str]) -> None:
        """Draw DFT: the divergence is no function of p."""
        DFT().draw(path)


def _parts(head: torch.nn.Module) -> tuple[Tensor | None, Tensor | None]:
    return cast(Tensor, head.weight), cast("Tensor | None", head.bias)
