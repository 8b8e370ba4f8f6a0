"""The class that the mixins stand on: TRL's trainer for the type checker, nothing at run time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from trl_ext.engine.context import RunContext
from trl_ext.engine.passes import ExtraPasses
from trl_ext.engine.step import OptimizerStep
from trl_ext.engine.streams import Stream
from trl_ext.engine.weight_swaps import WeightSwaps
from trl_ext.plugins.plugin_set import PluginSet
from trl_ext.records import TrainerKind, WeightsView
from trl_ext.startup.columns import Columns

if TYPE_CHECKING:
    from trl.trainer.base_trainer import _BaseTrainer as Trainer
else:
    Trainer = object


class Opened(Trainer):
    """What the mixins share. Defaults are on the class: TRL calls some methods on objects made without `__init__`."""

    ext_kind: ClassVar[TrainerKind]
    ext_config_class: ClassVar[type]
    ext_called_from: ClassVar[Mapping[str, str]]
    """Hook to the method of TRL in whose override it is called, for the methods that a user's subclass may replace."""

    ext_plugins: PluginSet = PluginSet()
    """The active plugins, in order."""
    ext_columns: Columns = Columns()
    """What is carried beside the tokens."""
    ext_streams: Mapping[str, Stream] = {}
    """Auxiliary data sets by role."""
    ext_weights: WeightsView = None  # type: ignore[assignment]
    """The trainable parameters; set when the model is prepared."""
    ext_reached: set[str]
    """The methods of `ext_called_from` that ran for the micro-batch at hand, or for its completions."""
    ext_run: RunContext
    ext_passes: ExtraPasses
    ext_step: OptimizerStep
    ext_swaps: WeightSwaps
    ext_metric_name: str = ""
    """The deployed weights under evaluation, where they are not the first: the name that their metrics carry."""
