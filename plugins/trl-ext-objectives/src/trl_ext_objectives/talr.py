"""TALR: NLL gated by p^(1/tau), tau being the batch's typical token loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from trl_ext import hookimpl
from trl_ext_objectives.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import TokenRecord


def typical_loss(nll: Tensor, mask: Tensor) -> Tensor:
    """() the median of the label tokens' losses; 1 where there is no label, and nothing to weigh.

    Args:
        nll: (B, T) float.
        mask: (B, T) bool.
    """
    return nll.masked_fill(~mask, float("nan")).nanmedian().nan_to_num(1.0).clamp(min=torch.finfo(nll.dtype).eps)


def talr_loss(log_probs: Tensor, tau: Tensor) -> Tensor:
    """`-sg[p^(1/tau)] log p`, any shape and float dtype (arXiv 2509.20758)."""
    return -(log_probs.detach() / tau).exp() * log_probs


@dataclass(eq=False)
class TALR(Objective):
    """Weigh each token by p^(1/tau), tau the typical token loss: half of the tokens weigh at least 1/e.

    tau is taken from this rank's micro-batch, so the weights depend on its size.
    """

    citation: ClassVar[str] = "Token-Adaptive Loss Reweighting, arXiv 2509.20758"

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T)."""
        return talr_loss(tokens.log_probs, typical_loss(-tokens.log_probs.detach(), tokens.mask))
