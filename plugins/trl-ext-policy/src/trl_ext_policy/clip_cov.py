"""`clip-cov`: a random few of the tokens of high covariance give no gradient (arXiv 2505.22617, eq. 11 and 12).

    L_t = -min(r_t A_t, clip(r_t) A_t),    and 0 for t in I

    I: a share 2e-4 of all tokens, drawn at random from those with cov_t in (1, 5) that the ratio does not clip already,
       cov_t = (log p_t - mean log p) (A_t - mean A)

Tokens of high covariance, likely ones with a high advantage, are what lets the policy's entropy collapse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trl_ext import hookimpl
from trl_ext.records import PolicyTokens, RunDescription
from trl_ext_policy.covariance import CovarianceLoss, covariances
from trl_ext_policy.surrogate import Clipped


@dataclass(eq=False, kw_only=True)
class ClipCov(CovarianceLoss):
    """Clip-Cov: the clipped policy term, without the gradient of a random few tokens of high covariance.

    Clipping of the ratio is TRL's, by `epsilon`, `epsilon_high` and `delta`.

    Args:
        share: how many tokens lose their gradient, as a share of a micro-batch's tokens in (0, 1], and at least one
            where there are any; the paper's r.
        low: covariance above which a token may be drawn.
        high: covariance below which it may.
    """

    low: float = 1.0
    high: float = 5.0

    citation: ClassVar[str] = "Cui et al., The Entropy Mechanism of RL for Reasoning (Clip-Cov), arXiv 2505.22617"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low >= self.high:
            raise ValueError(f"low={self.low} is not below high={self.high}, so that no token could be drawn")
        self._clipped = Clipped()

    @hookimpl
    def check(self, run: RunDescription) -> None:
        super().check(run)
        self._clipped = Clipped.of(run.args)

    @hookimpl
    def policy_loss(self, tokens: PolicyTokens) -> Tensor:
        """Loss (B, T), L_t of each token; TRL's `loss_type` divides it by its own denominator."""
        loss = self._clipped.loss(tokens, tokens.advantages)
        if not tokens.training:
            return loss
        covariance = covariances(tokens)
        candidates = tokens.mask & ~self._clipped.acts(tokens) & (covariance > self.low) & (covariance < self.high)
        return loss.masked_fill(self.chosen(tokens, torch.rand_like(loss), candidates), 0.0)
