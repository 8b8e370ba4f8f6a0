"""TRL's clipped policy term, for methods that change what goes into it or what becomes of a token in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trl_ext.records import PolicyTokens


@dataclass(frozen=True)
class Clipped:
    """-min(r A, clip(r, 1 - low, 1 + high) A), r the ratio to the policy that drew (arXiv 2402.03300, section 4.1).

    A `delta` bounds r in the first product (dual clip), as in TRL.
    """

    low: float = 0.2
    high: float = 0.2
    delta: float | None = None

    @classmethod
    def of(cls, args: Any) -> Clipped:
        """With the settings of the trainer's config."""
        high = args.epsilon if args.epsilon_high is None else args.epsilon_high
        return cls(args.epsilon, high, args.delta)

    def loss(self, tokens: PolicyTokens, advantages: Tensor) -> Tensor:
        """Loss (B, T) of each token; TRL's `loss_type` divides it by its own denominator."""
        return -self._gain((tokens.log_probs - tokens.old_log_probs).exp(), advantages)

    def acts(self, tokens: PolicyTokens) -> Tensor:
        """(B, T) bool: the tokens whose ratio is clipped, or bounded by `delta`, so that they have no gradient."""
        ratio = (tokens.log_probs.detach() - tokens.old_log_probs).exp()
        return self._gain(ratio, tokens.advantages) != ratio * tokens.advantages

    def _gain(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        clipped = ratio.clamp(1 - self.low, 1 + self.high)
        bounded = ratio if self.delta is None else ratio.clamp(max=self.delta)
        return torch.min(bounded * advantages, clipped * advantages)
