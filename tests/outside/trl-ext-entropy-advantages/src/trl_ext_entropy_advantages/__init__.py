"""An advantage for each token, larger where the policy was unsure (Reasoning with Exploration, arXiv 2506.14758)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from trl_ext import hookimpl
from trl_ext.options import Range


@dataclass(eq=False)
class EntropyAdvantages:
    """A_t <- A_t + min(alpha H_t, |A_t| / kappa), with H_t the entropy of the old policy: advantages (B, T).

    The bound keeps the sign of every advantage, and a group without differences teaches nothing, as before.

    Args:
        alpha: weight of the entropy, in nats.
        kappa: how many times larger than the bonus the advantage stays.
    """

    requires_api: ClassVar[str] = ">=1.5,<2"
    citation: ClassVar[str] = "Cheng et al., Reasoning with Exploration: An Entropy Perspective, arXiv:2506.14758"
    cost: ClassVar[str] = "a forward of the completions, unless TRL makes it anyway"
    rollout_outputs: ClassVar[tuple[str, ...]] = ("entropy",)

    alpha: Annotated[float, Range(ge=0)] = 0.4
    kappa: Annotated[float, Range(gt=1)] = 2.0

    @hookimpl
    def advantages(self, rollouts, advantages):
        per_token = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        return per_token + torch.minimum(self.alpha * rollouts.entropy, per_token.abs() / self.kappa)
