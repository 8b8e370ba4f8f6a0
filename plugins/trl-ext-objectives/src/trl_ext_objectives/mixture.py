"""Mixture: `weight first + (1 - weight) second`, whose weight can move over the training.

arXiv 2510.00526 compares single objectives along a continuum; mixing two of them is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from trl_ext import hookimpl
from trl_ext.options import Range
from trl_ext.plugins import activate
from trl_ext.schedules import Scheduled
from trl_ext_objectives.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import RunDescription, SetupContext, TokenRecord, WeightsView


def build_objective(spec: str | Mapping[str, Any], option: str) -> Objective:
    """Make an objective from the text or mapping of a config.

    Raises:
        ValueError: it is not exactly one objective of this distribution.
    """
    plugins = list(activate([spec], trainer="sft"))
    if len(plugins) != 1 or not isinstance(plugins[0].instance, Objective):
        raise ValueError(f"{option}={spec!r} is not one objective of trl-ext-objectives")
    return plugins[0].instance


@dataclass(eq=False)
class Mixture(Objective):
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
        self._first = build_objective(self.first, "first")
        self._second = build_objective(self.second, "second")
        parts = (self._first, self._second)
        for part in parts:
            if part.alone:
                raise ValueError(f"{part!r} cannot be mixed: {part.alone}")
        self.trainers = tuple(t for t in type(self).trainers if all(t in part.trainers for part in parts))
        self.fused_outputs = tuple(dict.fromkeys((*self._first.fused_outputs, *self._second.fused_outputs)))

    @property
    def moves(self) -> bool:
        """Whether the weight or a part changes over the training."""
        return super().moves or self._first.moves or self._second.moves

    @hookimpl
    def check(self, run: RunDescription) -> None:
        """Check both parts."""
        for hook in self._of_parts("check"):
            hook(run)

    @hookimpl
    def setup(self, context: SetupContext) -> None:
        """Set both parts up."""
        for hook in self._of_parts("setup"):
            hook(context)

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T), between the losses of the parts and in their units (after arXiv 2510.00526).

        The core's denominator is all label tokens of the window; a part with `normalization=kept` keeps its own.
        """
        weight = self.now("weight", tokens)
        return weight * self._first.per_token_loss(tokens) + (1 - weight) * self._second.per_token_loss(tokens)

    @hookimpl
    def weights_updated(self, weights: WeightsView, step: int, skipped: bool) -> None:
        """Pass the step on."""
        for hook in self._of_parts("weights_updated"):
            hook(weights, step, skipped)

    @hookimpl
    def metrics(self, mode: str) -> dict[str, float]:
        """The weight where it moves, and the metrics of both parts under `first_` and `second_`."""
        parts = (("first", self._first), ("second", self._second))
        inner = {f"{place}_{k}": v for place, part in parts for k, v in part.metrics(mode).items()}
        return super().metrics(mode) | inner

    def state_dict(self) -> dict[str, Any]:
        """The state of both parts, under `first.` and `second.`."""
        parts = (("first", self._first), ("second", self._second))
        return {
            f"{place}.{k}": v
            for place, part in parts
            if hasattr(part, "state_dict")
            for k, v in part.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take both back."""
        for place, part in (("first", self._first), ("second", self._second)):
            if hasattr(part, "load_state_dict"):
                own = {k.removeprefix(f"{place}."): v for k, v in state.items() if k.startswith(f"{place}.")}
                part.load_state_dict(own)

    def _of_parts(self, hook: str) -> Iterator[Any]:
        return (getattr(part, hook) for part in (self._first, self._second) if hasattr(part, hook))
