"""DEFT: `(1 - p^a) / a` with a = sg[sum_v p_v^2], the power family with an exponent per token (arXiv 2602.11424)."""

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
    """The exponent is how concentrated the distribution is: like NLL where the model is unsure, like -p where sure."""

    citation: ClassVar[str] = "Dynamic Entropy Fine-Tuning, arXiv 2602.11424"
    cost: ClassVar[str] = "one more output of the fused head"
    fused_outputs = ("log_sum_sq_probs",)

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T) in [0, 1 / a], where a is in (0, 1] (arXiv 2602.11424).

        The core's denominator is all label tokens of the window.
        """
        concentration = tokens.extras["log_sum_sq_probs"].detach().exp()
        return power_loss(tokens.log_probs, concentration)
