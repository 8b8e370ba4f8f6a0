"""By column: `f_c(p)`, where c is the value that a column of the data has for the token (after arXiv 2510.00526).

The paper finds that the base model's capability in a domain decides which objective is best there; choosing one for
each domain of a mixed data set is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from trl_ext import hookimpl
from trl_ext.records import Column
from trl_ext_objectives.composite import Composite

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import TokenRecord


@dataclass(eq=False)
class ByColumn(Composite):
    """An objective for each value of a column of the data, such as one for mathematics and one for conversations.

    Args:
        column: Name of the column, or of a key of the messages.
        objectives: Value to objective as in a config: `{math: "power:alpha=1", chat: nll}`. A value that is not named
            is refused.
        per: What there is one value for: "sample", "message" (each turn of the assistant) or "token".

    Raises:
        ValueError: No value is named, or an objective is none or cannot work beside another one.
    """

    citation: ClassVar[str] = "Beyond Log Likelihood: Probability-Based Objectives for SFT, arXiv 2510.00526"
    state_version: ClassVar[int] = 1

    column: str
    objectives: dict[str, str | dict[str, Any]]
    per: Literal["sample", "message", "token"] = "sample"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.objectives:
            raise ValueError("objectives={} chooses nothing; name an objective for each value of the column")
        self.take_parts(self.objectives)
        self.columns = (*self.columns, Column(self.column, self.per, dtype="text", values=tuple(self.objectives)))

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T) in the units of the token's objective, nats for the default of most (after arXiv 2510.00526).

        The core's denominator is all label tokens of the window, whatever their objective.
        """
        choice = tokens.per_token(self.column)
        loss = torch.zeros_like(tokens.log_probs)
        for place, part in enumerate(self._parts.values()):
            chosen = tokens.mask & (choice == place)
            loss = torch.where(chosen, part.per_token_loss(_only(tokens, chosen)), loss)
        return loss


def _only(tokens: TokenRecord, chosen: Tensor) -> TokenRecord:
    """The record as if no other token had a label."""
    log_probs, entropy = (torch.where(chosen, values, 0.0) for values in (tokens.log_probs, tokens.entropy))
    return replace(tokens, mask=chosen, log_probs=log_probs, entropy=entropy)
