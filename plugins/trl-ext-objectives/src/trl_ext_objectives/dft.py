"""DFT: `-sg[p] log p` (arXiv 2508.05629, equation 9).

Its gradient is that of -p; its value is p times NLL, as TRL's `loss_type="dft"` logs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trl_ext import hookimpl
from trl_ext_objectives.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import TokenRecord


@dataclass(eq=False)
class DFT(Objective):
    """Dynamic fine-tuning: `power` with alpha = 1 in gradient, TRL's `loss_type="dft"` in gradient and value."""

    citation: ClassVar[str] = "On the Generalization of SFT: Dynamic Fine-Tuning, arXiv 2508.05629"

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T) in [0, 1 / e] nats (arXiv 2508.05629, equation 9).

        The core's denominator is all label tokens of the window.
        """
        return -tokens.probs.detach() * tokens.log_probs
