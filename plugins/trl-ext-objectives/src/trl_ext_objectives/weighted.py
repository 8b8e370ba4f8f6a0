"""Weighted: `w f(p)`, the loss of another objective times a weight from the data (as in arXiv 2309.11235).

That paper weighs examples by the quality of their source, which is between plain SFT and reinforcement learning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from trl_ext import hookimpl
from trl_ext.records import Column
from trl_ext_objectives.composite import Composite

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import TokenRecord


@dataclass(eq=False)
class Weighted(Composite):
    """Weigh examples, the assistant's turns or single tokens by a column of the data; a negative weight unlearns.

    Args:
        column: Name of the column, or of a key of the messages.
        per: What there is one weight for: "sample", "message" (each turn of the assistant) or "token".
        denominator: "tokens" divides by all label tokens of the window, so that weights scale the step; "weights" by
            the sum of their absolute weights, so that only the ratios count.
        default: Weight of what has none; nothing refuses it.
        objective: What is weighted, as in a config: `"power:alpha=10"`, or a mapping with the key `name`.

    Raises:
        ValueError: The objective is none, or cannot be weighted.
    """

    citation: ClassVar[str] = (
        "OpenChat: Advancing Open-source Language Models with Mixed-Quality Data, arXiv 2309.11235"
    )
    state_version: ClassVar[int] = 1

    column: str = "weight"
    per: Literal["sample", "message", "token"] = "sample"
    denominator: Literal["tokens", "weights"] = "tokens"
    default: float | None = None
    objective: str | dict[str, Any] = "nll"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.take_parts({"objective": self.objective})
        self.columns = (*self.columns, Column(self.column, self.per, default=self.default))

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T), the objective's times the weight, in its units; nats by default (as in arXiv 2309.11235).

        The denominator is all label tokens of the window, or the sum of their absolute weights: see `denominator`.
        """
        loss = tokens.per_token(self.column) * self._parts["objective"].per_token_loss(tokens)
        if self.denominator == "tokens":
            return loss
        total = tokens.column_totals[self.column]
        return loss * torch.where(total > 0, tokens.denominator / total, 0.0)
