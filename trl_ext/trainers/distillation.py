"""`DistillationTrainer`: TRL's, with prompts, sampling, streams, gradients and weights open to plugins.

TRL's loss compares hidden states of student and teacher chunk by chunk and builds no log-probabilities, so there is no
hook in it. The teacher is never among the weights that plugins see.
"""

from __future__ import annotations

import trl

from trl_ext.config import DistillationConfig
from trl_ext.trainers.sampling import SamplingMixin


class DistillationTrainer(SamplingMixin, trl.DistillationTrainer):
    """Drop-in for `trl.DistillationTrainer` with the hook points of `trl_ext.hookspecs`.

    Give it as for TRL, and in addition:

    Args:
        plugins: instances to activate after those that `args.plugins` names.
        streams: role to auxiliary SFT data set, in addition to those that `args.streams` names.
    """

    ext_kind = "distillation"
    ext_config_class = DistillationConfig
    ext_called_from = {}


__all__ = ["DistillationTrainer"]
