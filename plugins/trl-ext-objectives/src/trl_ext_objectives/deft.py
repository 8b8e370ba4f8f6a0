"""DEFT: the power family whose exponent follows how concentrated the distribution is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trl_ext import hookimpl
from trl_ext_objectives.objective import Objective
from trl_ext_objectives.power import power_loss

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import TokenRecord


@dataclass(eq=False)
class DEFT(Objective):
    """`(1 - p^a) / a` with a = sg[sum_v p_v^2]: like NLL where the model is unsure, like -p where it is sure."""

    citation: ClassVar[str] = "Dynamic Entropy Fine-Tuning, arXiv 2602.11424"
    fused_outputs = ("log_sum_sq_probs",)

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T)."""
        concentration = tokens.extras["log_sum_sq_probs"].detach().exp()
        return power_loss(tokens.log_probs, concentration)
