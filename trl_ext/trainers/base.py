"""The class that the mixins stand on: TRL's trainer for the type checker, nothing at run time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from trl_ext.engine.guard import Guard
from trl_ext.engine.streams import Stream
from trl_ext.engine.tally import LossTally
from trl_ext.plugins.activation import PluginSet
from trl_ext.records import WeightsView

if TYPE_CHECKING:
    from trl.trainer.base_trainer import _BaseTrainer as Trainer
else:
    Trainer = object


class Opened(Trainer):
    """What the mixins share. Defaults are on the class: TRL calls some methods on objects made without `__init__`."""

    ext_kind: ClassVar[Literal["sft", "grpo"]]
    ext_config_class: ClassVar[type]

    ext_plugins: PluginSet = PluginSet()
    """The active plugins, in order."""
    ext_guard: Guard
    ext_tally: LossTally
    ext_streams: Mapping[str, Stream] = {}
    ext_fused_outputs: tuple[str, ...] = ()
    """Outputs that plugins want of the fused head, beside those that TRL's trainer asks for."""
    ext_weights: WeightsView
    """The trainable parameters; set when the model is prepared."""
    ext_prepared: bool = False
    ext_nonfinite: str = "ignore"
    """What to do on a NaN or infinite loss or gradient: "raise", "skip" or "ignore"."""
    ext_metric_name: str = ""
    """The deployed weights under evaluation, where they are not the first: the name that their metrics carry."""
    ext_skipped: bool = False
    """Whether this optimiser step is left out because its gradient was not finite."""

    def ext_progress(self) -> float:
        """Share of the optimiser steps already done, in [0, 1]."""
        return self.state.global_step / max(self.state.max_steps, 1)
