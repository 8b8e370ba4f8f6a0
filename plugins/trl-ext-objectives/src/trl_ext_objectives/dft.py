"""DFT: NLL gated by the detached probability. Its gradient is that of -p; its value is p times NLL, as TRL logs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trl_ext import hookimpl
from trl_ext_objectives.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import TokenRecord


def dft_loss(log_probs: Tensor) -> Tensor:
    """`-sg[p] log p`, any shape and float dtype (arXiv 2508.05629, equation 9)."""
    return -log_probs.detach().exp() * log_probs


@dataclass(eq=False)
class DFT(Objective):
    """Dynamic fine-tuning: `power` with alpha = 1 in gradient, TRL's `loss_type="dft"` in gradient and value."""

    citation: ClassVar[str] = "On the Generalization of SFT: Dynamic Fine-Tuning, arXiv 2508.05629"

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T)."""
        return dft_loss(tokens.log_probs)
