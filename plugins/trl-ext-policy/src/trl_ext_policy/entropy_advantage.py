"""`entropy-advantage`: tokens at which the policy is uncertain count for more (arXiv 2506.14758).

    A_t <- A_t + min(alpha H_t, |A_t| / kappa)

H_t is the entropy of the next-token distribution, a number here and not differentiated. With kappa > 1 the sign of an
advantage stays, and an advantage of 0 stays 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from trl_ext import hookimpl
from trl_ext.options import Range
from trl_ext.records import PolicyTokens, RunDescription
from trl_ext_policy.run_checks import refuse_other_terms
from trl_ext_policy.surrogate import Clipped


def shaped(advantages: Tensor, entropy: Tensor, alpha: float, kappa: float) -> Tensor:
    """A_t of the formula, of any shape; the entropy is in nats."""
    return advantages + torch.minimum(alpha * entropy, advantages.abs() / kappa)


@dataclass(eq=False)
class EntropyAdvantage:
    """Adds a clipped share of each token's entropy to its advantage, in TRL's clipped policy term.

    The entropy is that of the policy that is updated, from the forward of the loss, at the trainer's temperature.
    Where rollouts are used once it is that of the policy that drew them.

    Args:
        alpha: weight of the entropy in nats; the paper has 0.4 with GRPO.
        kappa: the entropy adds at most a share 1/kappa of the advantage.
    """

    requires_api: ClassVar[str] = "1"
    trainers: ClassVar[tuple[str, ...]] = ("grpo",)
    citation: ClassVar[str] = "Cheng et al., Reasoning with Exploration: An Entropy Perspective, arXiv 2506.14758"
    cost: ClassVar[str] = "none that can be measured"

    alpha: Annotated[float, Range(ge=0)] = 0.4
    kappa: Annotated[float, Range(gt=1)] = 2.0

    def __post_init__(self) -> None:
        self._clipped = Clipped()

    @hookimpl
    def check(self, run: RunDescription) -> None:
        """Refuse other policy terms than the clipped one."""
        refuse_other_terms(run)
        self._clipped = Clipped.of(run.args)

    @hookimpl
    def policy_loss(self, tokens: PolicyTokens) -> Tensor:
        """Loss (B, T), the clipped term with A_t; TRL's `loss_type` divides it by its own denominator."""
        return self._clipped.loss(tokens, shaped(tokens.advantages, tokens.entropy, self.alpha, self.kappa))
