"""WIT: `-w log p`, where w is one weight for the prompt's tokens and another for the response's (arXiv 2507.07817)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch

from trl_ext import hookimpl
from trl_ext.options import Range
from trl_ext.records import Column
from trl_ext_objectives.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import RunDescription, TokenRecord


@dataclass(eq=False)
class WIT(Objective):
    """Weighted instruction tuning: learn from the prompt too, at a weight of its own.

    (0, 1) is training on the completion alone, (1, 1) on the whole sequence. A weight of the prompt above 0 needs the
    settings `completion_only_loss: false` and `assistant_only_loss: false`, under which its tokens have labels.

    Args:
        prompt: Weight of a token of the prompt; 0.4 is that of the authors' script.
        response: Weight of a token of the completion; theirs is 0.6.

    Raises:
        ValueError: Both weights are 0.
    """

    requires_api: ClassVar[str] = ">=1.4,<2"
    citation: ClassVar[str] = "On the Effect of Instruction Tuning Loss on Generalization, arXiv 2507.07817"
    trainers = ("sft",)
    columns = (Column("completion_mask", per="token", dtype="int"),)

    prompt: Annotated[float, Range(ge=0)] = 0.4
    response: Annotated[float, Range(ge=0)] = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompt and not self.response:
            raise ValueError("prompt=0 and response=0 would train on nothing; set one of them above 0")

    @hookimpl
    def check(self, run: RunDescription) -> None:
        """Refuse settings under which the prompt has no labels."""
        for setting in ("completion_only_loss", "assistant_only_loss"):
            if self.prompt and getattr(run.args, setting) is not False:
                raise ValueError(
                    f"prompt={self.prompt:g} weighs tokens that have no label; set {setting}: false, or prompt=0"
                )

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T), at least 0, in nats times the weight (arXiv 2507.07817).

        The denominator is the label tokens of the window whose weight is not 0.
        """
        loss = torch.where(tokens.per_token("completion_mask") > 0, self.response, self.prompt) * -tokens.log_probs
        if self.prompt and self.response:
            return loss
        of_completion = tokens.column_totals["completion_mask"]
        counted = of_completion if self.response else tokens.denominator - of_completion
        return loss * torch.where(counted > 0, tokens.denominator / counted, 0.0)
