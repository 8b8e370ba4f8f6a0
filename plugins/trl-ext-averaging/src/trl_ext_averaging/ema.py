"""EMA: avg_t = d_t avg_{t-1} + (1 - d_t) theta_t, with avg_0 = theta_0; t counts updates and theta_0 is at `start`.

d_t = d, or with warm-up min(d, (1 + t) / (10 + t)), where t are the updates done before (the schedule of TensorFlow's
`ExponentialMovingAverage(num_updates=t)`). Averages of iterates are Polyak and Juditsky's (1992), who weigh all alike;
the exponential weights are those of the mean teacher (arXiv:1703.01780). As GRPO's reference: arXiv:2602.04417.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from trl_ext import hookimpl
from trl_ext.errors import ConfigurationError
from trl_ext.gradients import local_tensor, named_parameters
from trl_ext.options import Range
from trl_ext.records import RunDescription, SetupContext
from trl_ext_averaging.online import OnlineAverage
from trl_ext_averaging.shadows import Copies

Decay = Annotated[float, Range(ge=0, lt=1)]


def decay_at(update: int, decay: float, warmup: bool) -> float:
    """d_t of update number `update`, counted from 1."""
    return min(decay, update / (9 + update)) if warmup else decay


@dataclass(eq=False)
class Ema(OnlineAverage):
    """Exponential moving average of the weights, updated once every `every` optimiser steps from `start` on.

    Args:
        decay: d, per update; a list keeps one average for each value, named `ema_<d>`.
        warmup: raise the decay from 0.1 on, so that the start is forgotten sooner.
        reference: GRPO: the average that is the reference policy of the KL term, `ema` or `ema_<d>`; empty leaves TRL's
            reference alone.

    Raises:
        ValueError: no decay, one twice, `reference` names no average, or the average is not beside the weights.
    """

    decay: Decay | list[Decay] = 0.999
    warmup: bool = False
    reference: str = ""

    method: ClassVar[str] = "ema"
    citation: ClassVar[str] = "Polyak and Juditsky, Acceleration of stochastic approximation by averaging, 1992"

    def __post_init__(self) -> None:
        self._decays = tuple(self.decay) if isinstance(self.decay, Sequence) else (self.decay,)
        names = self.averages()
        if not names or len(set(names)) < len(names):
            raise ValueError(f"ema: decay={self.decay!r} names no decay, or one twice (names have six digits)")
        if self.reference not in ("", *names):
            raise ValueError(f"ema: reference={self.reference!r} is not one of {', '.join(names)}")
        if self.reference and self.device == "cpu":
            raise ValueError("ema: reference needs the average beside the weights; remove device=cpu")
        self._reference: list[Tensor] = []
        super().__post_init__()

    def averages(self) -> tuple[str, ...]:
        return ("ema",) if len(self._decays) == 1 else tuple(f"ema_{decay:g}" for decay in self._decays)

    def update(self, copies: Copies, theta: list[Tensor], updates: int, step: int) -> None:
        for name, decay in zip(self.averages(), self._decays, strict=True):
            torch._foreach_lerp_(copies[name], theta, 1 - decay_at(updates, decay, self.warmup))

    @hookimpl
    def check(self, run: RunDescription) -> None:
        super().check(run)
        if self.reference and (run.trainer != "grpo" or not run.args.beta):
            raise ConfigurationError(
                f"reference={self.reference!r} needs a KL term: use GRPO with beta above 0, or remove reference"
            )
        if self.reference and run.args.sync_ref_model:
            raise ConfigurationError(
                f"reference={self.reference!r} and sync_ref_model=True both move the reference; set one of them only"
            )

    @hookimpl
    def setup(self, context: SetupContext) -> None:
        self._reference = []
        super().setup(context)
        if self.reference:
            self._reference = self._reference_tensors(context)
            self.copies_changed()

    @property
    def awaited(self) -> bool:
        return bool(self.reference) or super().awaited

    @torch.no_grad()
    def copies_changed(self) -> None:
        if self._reference and self._began:
            torch._foreach_copy_(self._reference, self._shadows.copies[self.reference])

    def _reference_tensors(self, context: SetupContext) -> list[Tensor]:
        """The reference's counterparts of the averaged parameters: in its own model, or in PEFT's adapter "ref"."""
        if context.reference is not None:
            found = named_parameters(context.reference)
        else:
            own = named_parameters(context.model)
            found = {name.replace(".ref.", ".default."): p for name, p in own.items() if ".ref." in name}
        missing = [name for name in self._shadows.names if name not in found]
        if missing:
            raise ConfigurationError(
                f"ema: reference={self.reference!r}, but the trainer has no reference with a parameter {missing[0]}; "
                "a fresh adapter has the base model for its reference: fine-tune fully, or start from a saved adapter"
            )
        return [local_tensor(found[name].detach()) for name in self._shadows.names]
