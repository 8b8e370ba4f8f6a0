"""All that opens a TRL trainer, in one mixin.

The parts only wrap methods of TRL and transformers, before or after; `trl_ext.seams` lists each of them. Without
plugins every override is a plain call to `super()`.
"""

from __future__ import annotations

from trl_ext.trainers.construction import ConstructionMixin
from trl_ext.trainers.deployment import DeploymentMixin
from trl_ext.trainers.saving import CheckpointMixin
from trl_ext.trainers.training import TrainingMixin


class TrainerMixin(CheckpointMixin, DeploymentMixin, TrainingMixin, ConstructionMixin):
    """Opens the hook points in a TRL trainer.

    Args:
        *args, **kwargs: those of the TRL trainer, under the same names.
        plugins: instances to activate after the plugins that `args.plugins` names.
        streams: role to auxiliary `datasets.Dataset`, in addition to those that `args.streams` names.

    Raises:
        ConfigurationError: before the model loads, for anything that cannot work.
    """
