"""Mixture: `weight first + (1 - weight) second`, whose weight can move over the training.

arXiv 2510.00526 compares single objectives along a continuum; mixing two of them is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from trl_ext import hookimpl
from trl_ext.options import Range
from trl_ext.schedules import Scheduled
from trl_ext_objectives.composite import Composite

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import TokenRecord


@dataclass(eq=False)
class Mixture(Composite):
    """Two objectives at once, per token.

    Args:
        first: Objective as in a config: `"power:alpha=10"`, or a mapping with the key `name`.
        second: The other one, likewise.
        weight: Share of the first, or a schedule: `"linear:0:1"` moves from the second to the first.

    Raises:
        ValueError: A part is no objective, or cannot work beside another one.
    """

    citation: ClassVar[str] = "Beyond Log Likelihood: Probability-Based Objectives for SFT, arXiv 2510.00526"
    cost: ClassVar[str] = "what its two objectives cost"
    state_version: ClassVar[int] = 1

    first: str | dict[str, Any] = "power"
    second: str | dict[str, Any] = "nll"
    weight: Annotated[Scheduled, Range(ge=0, le=1)] = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.take_parts({"first": self.first, "second": self.second})

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T), between the losses of the parts and in their units (after arXiv 2510.00526).

        The core's denominator is all label tokens of the window; a part with `normalization=kept` keeps its own.
        """
        weight, parts = self.now("weight", tokens), self._parts
        return weight * parts["first"].per_token_loss(tokens) + (1 - weight) * parts["second"].per_token_loss(tokens)
