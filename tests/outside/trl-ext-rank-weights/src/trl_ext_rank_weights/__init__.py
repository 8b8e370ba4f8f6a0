"""Weigh each token by the rank of its label, so that what the model nearly says leads, however sure it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from trl_ext import hookimpl
from trl_ext.options import Range


@dataclass(eq=False)
class RankWeights:
    """Scale the negative log-likelihood by (1 + rank)^-gamma, where the rank counts the likelier tokens.

    Loss (B, T) over the core's denominator, all label tokens of the window. The weight carries no gradient.

    Args:
        gamma: 0 is plain NLL; the larger it is, the less the tokens with many likelier ones count.
    """

    requires_api: ClassVar[str] = ">=1.5,<2"
    cost: ClassVar[str] = "one more output of the fused head"
    fused_outputs: ClassVar[tuple[str, ...]] = ("label_rank",)

    gamma: Annotated[float, Range(ge=0)] = 0.5

    @hookimpl
    def per_token_loss(self, tokens):
        weight = (1.0 + tokens.extras["label_rank"]) ** -self.gamma
        return -weight * tokens.log_probs
