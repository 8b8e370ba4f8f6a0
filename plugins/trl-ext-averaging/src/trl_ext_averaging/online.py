"""What every average in training shares: its options, when its copies are updated, and when they are swapped in.

A method is a subclass that names its copies (`copy_kinds`), updates them (`update`) and gives the weights to deploy
(`deployed`). Both functions are elementwise on lists of tensors and know nothing of shards, devices or chunks: the
copies are kept by `shadows`, the swap is done by `swapping`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from torch import Tensor

from trl_ext import hookimpl
from trl_ext.errors import ConfigurationError
from trl_ext.hookspecs import HOOKS
from trl_ext.options import Range
from trl_ext.records import RunDescription, SetupContext, WeightsView
from trl_ext_averaging.shadows import Copies, CopyKind, Shadows
from trl_ext_averaging.swapping import swapped

Interval = Annotated[int, Range(ge=1)]
"""Optimiser steps between updates."""
_ONE_AVERAGE = (
    "a run evaluates and saves one average; of a sweep list the values in one plugin, as ema:decay=[0.99,0.999] or "
    "wise-ft:alpha=[0.3,0.6], and take out the others"
)


@dataclass(eq=False, kw_only=True)
class OnlineAverage:
    """Base of the averages in training.

    Args:
        start: optimiser steps before averaging begins; until then the raw weights are deployed.
        every: optimiser steps between updates, counted from `start`. A step that was skipped is not averaged.
        parameters: regular expression; only the trainable parameters whose name it matches are averaged.
        device: "model" keeps the copies beside the weights; "cpu" keeps them in host memory. On CUDA updates run
            beside the next step: on a side stream, or from pinned copies of the weights in a thread.
        deploy: what evaluation and the final model use: "raw" or the name of an average; the first average if empty.
        compare: also evaluate the raw weights and all other averages, as `eval_<name>_loss` and so on.
        sampling: where the trainer draws completions: the name of the average to draw them from in training; the
            policy if empty.

    Raises:
        ValueError: `deploy` or `sampling` names no average, or `parameters` is not a regular expression.
    """

    start: Annotated[int, Range(ge=0)] = 0
    every: Interval = 1
    parameters: str = ""
    device: Literal["model", "cpu"] = "model"
    deploy: str = ""
    compare: bool = False
    sampling: str = ""

    method: ClassVar[str]
    follows: ClassVar[bool] = True
    """Whether the copies are updated after `start`."""
    requires_api: ClassVar[str] = ">=1.5,<2"  # end
    cost: ClassVar[str] = "a copy of the weights for each average, and 0.3 % of a step on a CPU"
    state_version: ClassVar[int] = 1
    provides: ClassVar[tuple[str, ...]] = ("weight-average",)
    conflicts: ClassVar[Mapping[str, str]] = {"weight-average": _ONE_AVERAGE}

    def __post_init__(self) -> None:
        name, known = self.method, self.averages()
        if self.deploy not in ("", "raw", *known):
            raise ValueError(f"{name}: deploy={self.deploy!r} is not one of raw, {', '.join(known)}")
        if self.sampling not in ("", *known):
            raise ValueError(f"{name}: sampling={self.sampling!r} is not one of {', '.join(known)}")
        try:
            re.compile(self.parameters)
        except re.error as error:
            raise ValueError(f"{name}: parameters={self.parameters!r} is not a regular expression: {error}") from error
        self._step = 0
        self._updates = 0
        self._began = False
        self._selected: list[int] = []
        self._shadows = Shadows()
        self._written_in_backward = False

    # What a method defines.

    def averages(self) -> tuple[str, ...]:
        """Names of the averages, as in metrics and in `deploy`."""
        return (self.method.replace("-", "_"),)

    def copy_kinds(self) -> Mapping[str, CopyKind]:
        """Names of the stored copies: "wide" (fp32, or wider where the weights are) or "exact" (as the weights)."""
        return dict.fromkeys(self.averages(), "wide")

    def update(self, copies: Copies, theta: list[Tensor], updates: int, step: int) -> None:
        """Update copies in place with the weights of optimiser step `step`; `updates` counts from 1."""

    def deployed(self, name: str, copies: Copies, theta: list[Tensor]) -> Sequence[Tensor]:
        """The weights of average `name`, given the copies and the raw weights; does not change its arguments."""
        return copies[name]

    def copies_changed(self) -> None:
        """Called after the copies have been written on the weights' device: at the start, updated, or loaded."""

    @property
    def awaited(self) -> bool:
        """Whether no update can run beside the next step: that needs what `copies_changed` does, or does not wait."""
        return self._written_in_backward

    @property
    def ready(self) -> bool:
        """Whether there is an average to deploy."""
        return self._began

    # Hooks.

    @hookimpl
    def check(self, run: RunDescription) -> None:
        drawing = HOOKS["sampling_weights"].trainers
        if self.sampling and run.trainer not in drawing:
            raise ConfigurationError(
                f"sampling={self.sampling!r} is for trainers that draw completions ({', '.join(drawing)}), and this is "
                f"{run.trainer}; remove it"
            )
        # LOMO writes to the weights in the backward pass, in no step of an optimiser that could be held up.
        self._written_in_backward = str(getattr(run.args.optim, "value", run.args.optim)).endswith("lomo")

    @hookimpl
    def setup(self, context: SetupContext) -> None:
        names = context.weights.names
        self._selected = [i for i, name in enumerate(names) if re.search(self.parameters, name)]
        if not self._selected:
            raise ConfigurationError(
                f"{self.method}: parameters={self.parameters!r} matches none of the {len(names)} trainable parameters "
                f"(the first: {names[:3]})"
            )
        self._step = self._updates = 0
        self._began = False
        parameters, on_host = [context.weights.parameters[i] for i in self._selected], self.device == "cpu"
        self._shadows.close()
        self._shadows = Shadows(
            [names[i] for i in self._selected],
            parameters,
            self.copy_kinds(),
            on_host=on_host,
            beside=self.follows and not self.awaited,
        )
        if self.start == 0:
            self._begin(self._theta(context.weights))

    @hookimpl
    def weights_updated(self, weights: WeightsView, step: int, skipped: bool) -> None:
        self._step = step
        if step == self.start:
            self._begin(self._theta(weights))
        elif self.follows and step > self.start and (step - self.start) % self.every == 0 and not skipped:
            self._updates += 1
            updates = self._updates  # as of now: an update in a thread runs later
            self._shadows.update(
                self._theta(weights),
                lambda copies, theta: self.update(copies, theta, updates, step),
                self.copies_changed,
            )

    @hookimpl
    def deployed_weights(
        self, weights: WeightsView
    ) -> AbstractContextManager[None] | dict[str, AbstractContextManager[None]]:
        first = self.deploy or self.averages()[0]
        if not self.compare:
            return self._swapped(weights, first)
        names = [first, *(name for name in ("raw", *self.averages()) if name != first)]
        return {name: self._swapped(weights, name) for name in names}

    @hookimpl
    def sampling_weights(self, weights: WeightsView) -> AbstractContextManager[None] | None:
        return self._swapped(weights, self.sampling) if self.sampling else None

    @hookimpl
    def end(self, weights: WeightsView, step: int) -> None:
        self._shadows.close()  # the best model may be loaded into the weights next

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Counters, and the copies under `<copy>/<parameter>` once averaging has begun (DTensors under FSDP2)."""
        copies = self._shadows.state_dict() if self._began else {}
        return {"step": self._step, "updates": self._updates, "began": self._began, **copies}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state; `setup` comes first.

        Raises:
            CheckpointError: a copy is missing or has another shape, i.e. the options or the model have changed.
        """
        if state["began"]:
            self._shadows.load_state_dict(state, self.method)
        self._step, self._updates, self._began = int(state["step"]), int(state["updates"]), bool(state["began"])
        self.copies_changed()

    # Mechanism.

    def _theta(self, weights: WeightsView) -> list[Tensor]:
        local = weights.local()
        return [local[i] for i in self._selected]

    def _begin(self, theta: list[Tensor]) -> None:
        self._shadows.begin(theta)
        self._began = True
        self.copies_changed()

    def _swapped(self, weights: WeightsView, name: str) -> AbstractContextManager[None]:
        if name == "raw" or not self.ready:
            return nullcontext()

        def write(into: list[Tensor], theta: list[Tensor]) -> None:
            self._shadows.write(into, theta, lambda copies, raw: self.deployed(name, copies, raw))

        return swapped(self._theta(weights), write, in_host_memory=self.device == "cpu")
