"""`RLOOTrainer`: TRL's, with the prompts, the advantages, the policy term and auxiliary losses open to plugins.

TRL's loss takes the ratio of whole completions, so there is one advantage each, and the KL term is part of the reward.
A plugin's policy term is per token all the same: its sum over a completion takes the place of the completion's clipped
term, and TRL's mean over completions stays.
"""

from __future__ import annotations

from typing import Any

import trl
from torch import Tensor

from trl_ext.config import RLOOConfig
from trl_ext.trainers.rewarded import RewardedMixin


class _KeepsTokens(trl.RLOOTrainer):
    """TRL's, which keeps old log-probabilities per token where plugins want them; of itself it keeps their sums."""

    _ext_while_scoring: list[Tensor] | None = None
    """The log-probabilities that TRL has computed for the completions at hand: the policy's, then the reference's."""

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        output = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._ext_while_scoring is not None:
            self._ext_while_scoring.append(output[0])
        return output

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        plugins = self.ext_plugins
        if not plugins.implements("policy_loss") and not plugins.implements("advantages"):
            return super()._generate_and_score_completions(inputs)
        computed: list[Tensor] = []
        self._ext_while_scoring = computed
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self._ext_while_scoring = None
        return output | dict(zip(("old_per_token_logps", "ref_per_token_logps"), computed, strict=False))


class RLOOTrainer(RewardedMixin, _KeepsTokens):
    """Drop-in for `trl.RLOOTrainer` with the hook points of `trl_ext.hookspecs`. Give it as for TRL, and in addition:

    Args:
        plugins: instances to activate after those that `args.plugins` names.
        streams: role to auxiliary SFT data set, in addition to those that `args.streams` names.
    """

    ext_kind = "rloo"
    ext_config_class = RLOOConfig
    ext_other_terms = {"aux_loss_enabled": False}
    ext_per_token = False


__all__ = ["RLOOTrainer"]
