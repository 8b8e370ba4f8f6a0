"""`kl-cov`: the tokens of the highest covariance are held near the policy that drew them (KL-Cov, arXiv 2505.22617).

    L_t = -r_t A_t + beta |log r_t|  for t in I,    and -r_t A_t for the others (eq. 14)

    I: the share 2e-3 of all tokens with the highest cov_t = (log p_t - mean log p) (A_t - mean A)

The absolute log-ratio is what the authors' code has for the KL divergence to the old policy. There is no clipping.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from trl_ext import hookimpl
from trl_ext.options import Range
from trl_ext.records import PolicyTokens, RunDescription
from trl_ext_policy.covariance import CovarianceLoss, covariances

logger = logging.getLogger(__name__)


@dataclass(eq=False, kw_only=True)
class KLCov(CovarianceLoss):
    """KL-Cov: the policy gradient without clipping, and a penalty on the ratio of a few tokens of high covariance.

    The penalty has no gradient where the ratio is 1. So it acts where rollouts are used for several updates only:
    `num_iterations` above 1, or `steps_per_generation` above `gradient_accumulation_steps`.

    Args:
        share: how many tokens get the penalty, as a share of a micro-batch's tokens in (0, 1], and at least one; the
            paper's k, 2e-3 for a model of 7B and 2e-4 for one of 32B.
        beta: weight of the penalty.
    """

    share: Annotated[float, Range(gt=0, le=1)] = 2e-3
    beta: Annotated[float, Range(ge=0)] = 1.0

    citation: ClassVar[str] = "Cui et al., The Entropy Mechanism of RL for Reasoning (KL-Cov), arXiv 2505.22617"

    @hookimpl
    def check(self, run: RunDescription) -> None:
        super().check(run)
        args = run.args
        if args.delta is not None:
            raise ValueError(f"delta={args.delta} bounds a ratio that kl-cov does not clip; leave delta out")
        if args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations) == 0:
            logger.warning(
                "kl-cov: each rollout is used for one update, in which all ratios are 1 and the penalty has no "
                "gradient; set num_iterations=2, or steps_per_generation above gradient_accumulation_steps"
            )

    @hookimpl
    def policy_loss(self, tokens: PolicyTokens) -> Tensor:
        """Loss (B, T), L_t of each token; TRL's `loss_type` divides it by its own denominator."""
        log_ratio = tokens.log_probs - tokens.old_log_probs
        loss = -log_ratio.exp() * tokens.advantages
        if not tokens.training:
            return loss
        penalized = self.chosen(tokens, covariances(tokens), tokens.mask)
        return torch.where(penalized, loss + self.beta * log_ratio.abs(), loss)
