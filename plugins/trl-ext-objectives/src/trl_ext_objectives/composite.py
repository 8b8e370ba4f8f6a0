"""What objectives that are made of other objectives share: all but the loss is passed on to the parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from trl_ext import hookimpl
from trl_ext.plugins import activate
from trl_ext_objectives.objective import Objective

if TYPE_CHECKING:
    from trl_ext.records import RunDescription, SetupContext, WeightsView

Spec = str | dict[str, Any]
"""An objective as in a config: `"power:alpha=10"`, or a mapping with the key `name`."""


def build_objective(spec: str | Mapping[str, Any], option: str) -> Objective:
    """Make an objective from the text or mapping of a config.

    Raises:
        ValueError: it is not exactly one objective of this distribution.
    """
    plugins = list(activate([spec], trainer="sft"))
    if len(plugins) != 1 or not isinstance(plugins[0].instance, Objective):
        raise ValueError(f"{option}={spec!r} is not one objective of trl-ext-objectives")
    return plugins[0].instance


class Composite(Objective):
    """Base of the objectives with parts, which a subclass takes in its `__post_init__`."""

    _parts: Mapping[str, Objective]

    def take_parts(self, specs: Mapping[str, Spec]) -> None:
        """Make the parts, by the names that they have in options, metrics and state.

        Raises:
            ValueError: A part is no objective, or cannot work as a part.
        """
        self._parts = {name: build_objective(spec, name) for name, spec in specs.items()}
        parts = list(self._parts.values())
        for part in parts:
            if part.alone:
                raise ValueError(f"{part!r} cannot be mixed: {part.alone}")
        self.trainers = tuple(t for t in type(self).trainers if all(t in part.trainers for part in parts))
        self.fused_outputs = tuple(dict.fromkeys(output for part in parts for output in part.fused_outputs))
        self.columns = tuple(dict.fromkeys(column for part in parts for column in part.columns))

    @property
    def moves(self) -> bool:
        """Whether an option of this or of a part changes over the training."""
        return super().moves or any(part.moves for part in self._parts.values())

    @hookimpl
    def check(self, run: RunDescription) -> None:
        """Check the parts."""
        for hook in self._of_parts("check"):
            hook(run)

    @hookimpl
    def setup(self, context: SetupContext) -> None:
        """Set the parts up."""
        for hook in self._of_parts("setup"):
            hook(context)

    @hookimpl
    def weights_updated(self, weights: WeightsView, step: int, skipped: bool) -> None:
        """Pass the step on."""
        for hook in self._of_parts("weights_updated"):
            hook(weights, step, skipped)

    @hookimpl
    def metrics(self, mode: str) -> dict[str, float]:
        """Options that move, and the metrics of the parts under `<part>_`."""
        inner = {f"{name}_{k}": v for name, part in self._parts.items() for k, v in part.metrics(mode).items()}
        return super().metrics(mode) | inner

    def state_dict(self) -> dict[str, Any]:
        """The state of the parts, under `<part>.`."""
        return {
            f"{name}.{key}": value
            for name, part in self._parts.items()
            if hasattr(part, "state_dict")
            for key, value in part.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        for name, part in self._parts.items():
            if hasattr(part, "load_state_dict"):
                own = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
                part.load_state_dict(own)

    def _of_parts(self, hook: str) -> Iterator[Any]:
        return (getattr(part, hook) for part in self._parts.values() if hasattr(part, hook))
