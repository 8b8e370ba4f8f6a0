"""`RewardTrainer`: TRL's, with gradients, optimiser and weights open to plugins.

A reward model has a score in place of a language-model head. So there are no log-probabilities of tokens, and no SFT
data to run it on: streams are refused, and what works on a loss per token is not called.
"""

from __future__ import annotations

import trl

from trl_ext.config import RewardConfig
from trl_ext.trainers.construction import TrainerMixin


class RewardTrainer(TrainerMixin, trl.RewardTrainer):
    """Drop-in for `trl.RewardTrainer` with the hook points of `trl_ext.hookspecs`. Give it as for TRL, and in addition:

    Args:
        plugins: instances to activate after those that `args.plugins` names.
    """

    ext_kind = "reward"
    ext_config_class = RewardConfig
    ext_called_from = {}


__all__ = ["RewardTrainer"]
