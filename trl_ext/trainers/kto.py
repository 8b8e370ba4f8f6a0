"""`KTOTrainer`: TRL's, which learns from single completions, good and bad, with what DPO opens open to plugins."""

from __future__ import annotations

import trl

from trl_ext.config import KTOConfig
from trl_ext.trainers.preferences import PreferenceMixin


class KTOTrainer(PreferenceMixin, trl.KTOTrainer):
    """Drop-in for `trl.KTOTrainer` with the hook points of `trl_ext.hookspecs`. Give it as for TRL, and in addition:

    Args:
        plugins: instances to activate after those that `args.plugins` names.
        streams: role to auxiliary SFT data set, in addition to those that `args.streams` names.
    """

    ext_kind = "kto"
    ext_config_class = KTOConfig


__all__ = ["KTOTrainer"]
