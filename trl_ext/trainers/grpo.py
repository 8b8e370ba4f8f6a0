"""`GRPOTrainer`: TRL's, with the prompts, the advantages, the policy term and auxiliary losses open to plugins."""

from __future__ import annotations

from typing import Any

import trl

from trl_ext.config import GRPOConfig
from trl_ext.trainers.rewarded import RewardedMixin


class GRPOTrainer(RewardedMixin, trl.GRPOTrainer):
    """Drop-in for `trl.GRPOTrainer` with the hook points of `trl_ext.hookspecs`. Give it as for TRL, and in addition:

    Args:
        plugins: instances to activate after those that `args.plugins` names.
        streams: role to auxiliary SFT data set, in addition to those that `args.streams` names.
    """

    ext_kind = "grpo"
    ext_config_class = GRPOConfig
    ext_other_terms = {"beta": 0.0, "_entropy_bonus_enabled": False, "aux_loss_enabled": False}
    ext_per_token = True

    def _ext_schedule(self) -> dict[str, Any]:
        correction = self.args.vllm_importance_sampling_correction
        return super()._ext_schedule() | {"vllm_importance_sampling_correction": correction}


__all__ = ["GRPOTrainer"]
