"""Rho-1: `-log p` of the share of tokens with the largest `log p_ref - log p` (arXiv 2404.07965, section 2.2).

It trains on the tokens that a good reference model finds easier than the current one does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch

from trl_ext import hookimpl
from trl_ext.options import Range
from trl_ext.schedules import Scheduled
from trl_ext_objectives.kept_tokens import KeptShare, Normalization, normalized
from trl_ext_objectives.reference_objective import ReferenceObjective

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import TokenRecord


def keep_top_excess(log_probs: Tensor, reference: Tensor, mask: Tensor, share: float) -> Tensor:
    """The `share` of label tokens, rounded up, with the largest excess loss `log p_ref - log p`, as (B, T) bool."""
    excess = (reference - log_probs.detach()).masked_fill(~mask, float("-inf")).flatten()
    rank = torch.empty_like(excess, dtype=torch.long)
    rank[excess.argsort(descending=True, stable=True)] = torch.arange(excess.numel(), device=excess.device)
    # Rounded first, so that 0.6 x 5 keeps 3 and not 4.
    count = (share * mask.sum() - 1e-4).ceil()
    return mask & (rank < count).view_as(mask)


@dataclass(eq=False)
class Rho1(ReferenceObjective):
    """Selective language modelling: NLL of the tokens that are worth learning, chosen anew in each micro-batch.

    Args:
        reference: A model trained on good data, as `model:PATH` or `cache:PATH`. The start model would tie all tokens.
        share: Share of the label tokens to keep, or a schedule.
        normalization: "kept" divides each micro-batch by its kept tokens (the paper's), "valid" by all label tokens.
    """

    citation: ClassVar[str] = "Rho-1: Not All Tokens Are What You Need, arXiv 2404.07965"
    unsupported: ClassVar[dict[str, str]] = {"accumulation": "Tokens are chosen among those of a micro-batch."}

    reference: str
    share: Annotated[Scheduled, Range(gt=0, le=1)] = 0.6
    normalization: Normalization = "kept"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._kept = KeptShare()

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T) in nats, at least 0, and 0 for tokens that are not kept (arXiv 2404.07965, section 2.2).

        The denominator is the kept tokens of each micro-batch, or all label tokens of the window: see `normalization`.
        """
        reference = self.reference_log_probs(tokens)
        kept = keep_top_excess(tokens.log_probs, reference, tokens.mask, self.now("share", tokens))
        self._kept.add(kept, tokens)
        return normalized(-tokens.log_probs, kept, tokens, self.normalization)

    @hookimpl
    def metrics(self, mode: str) -> dict[str, float]:
        """The share of tokens kept on this rank since the last log, and which denominator is in use."""
        by_kept = {"normalized_by_kept": float(self.normalization == "kept")}
        return super().metrics(mode) | by_kept | self._kept.pop(mode)
