"""TALR: `-sg[p^(1/tau)] log p`, where tau is the batch's typical token loss (arXiv 2509.20758)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from trl_ext import hookimpl
from trl_ext_objectives.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import TokenRecord


def talr_loss(log_probs: Tensor, tau: Tensor) -> Tensor:
    """`-sg[p^(1/tau)] log p`, any shape and float dtype (arXiv 2509.20758)."""
    return -(log_probs.detach() / tau).exp() * log_probs


def typical_loss(nll: Tensor, mask: Tensor) -> Tensor:
    """() the median of the label tokens' losses in nats; 1 where there is no label, and nothing to weigh.

    Args:
        nll: (B, T) float.
        mask: (B, T) bool.
    """
    return nll.masked_fill(~mask, float("nan")).nanmedian().nan_to_num(1.0).clamp(min=torch.finfo(nll.dtype).eps)


@dataclass(eq=False)
class TALR(Objective):
    """Half of the tokens weigh at least 1/e, the rest less the less likely they are.

    tau is the median over the tokens of this rank's micro-batch, so the weights depend on its size. The paper takes the
    median of the sequences' mean losses.
    """

    citation: ClassVar[str] = "Token-Adaptive Loss Reweighting, arXiv 2509.20758"
    unsupported: ClassVar[dict[str, str]] = {"accumulation": "The median is over the tokens of a micro-batch."}

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T) in [0, tau / e] nats (arXiv 2509.20758).

        The core's denominator is all label tokens of the window.
        """
        return talr_loss(tokens.log_probs, typical_loss(-tokens.log_probs.detach(), tokens.mask))
