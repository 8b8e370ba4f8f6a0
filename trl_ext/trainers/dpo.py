"""`DPOTrainer`: TRL's, which learns from pairs of completions, with streams, gradients and weights open to plugins."""

from __future__ import annotations

import trl

from trl_ext.config import DPOConfig
from trl_ext.trainers.preferences import PreferenceMixin


class DPOTrainer(PreferenceMixin, trl.DPOTrainer):
    """Drop-in for `trl.DPOTrainer` with the hook points of `trl_ext.hookspecs`. Give it as for TRL, and in addition:

    Args:
        plugins: instances to activate after those that `args.plugins` names.
        streams: role to auxiliary SFT data set, in addition to those that `args.streams` names.
    """

    ext_kind = "dpo"
    ext_config_class = DPOConfig


__all__ = ["DPOTrainer"]
