"""Which tokens move the policy's entropy most: those whose log-probability and advantage vary together.

    cov_t = (log p_t - mean log p) (A_t - mean A)

with means over the tokens of a micro-batch (arXiv 2505.22617, eq. 10, and the authors' code).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from accelerate.utils import reduce
from torch import Tensor

from trl_ext import hookimpl
from trl_ext.options import Range
from trl_ext.records import PolicyTokens, RunDescription
from trl_ext_policy.run_checks import refuse_other_terms


def covariances(tokens: PolicyTokens) -> Tensor:
    """(B, T) float: cov_t of each token, without a gradient; what it is where the mask is False means nothing."""
    count = tokens.mask.sum().clamp(min=1)

    def centered(x: Tensor) -> Tensor:
        return x - torch.where(tokens.mask, x, 0).sum() / count

    return centered(tokens.log_probs.detach()) * centered(tokens.advantages)


def highest(scores: Tensor, among: Tensor, share: float, of: Tensor) -> Tensor:
    """Mark the share of `of` that scores highest, at least one, without a look at the numbers from the host.

    Args:
        scores: (B, T) float.
        among: (B, T) bool: the tokens that may be marked.
        share: in (0, 1].
        of: (B, T) bool: the tokens that the share is of.

    Returns:
        (B, T) bool, as many as there may be.
    """
    count = (share * of.sum()).floor().clamp(min=1)
    rank = torch.where(among, scores, -torch.inf).flatten().argsort(descending=True).argsort()
    return among & (rank < count).view_as(among)


@dataclass(eq=False, kw_only=True)
class CovarianceLoss:
    """Base of the methods that treat a few tokens of high covariance apart.

    The tokens are chosen within a micro-batch, as in the authors' code, so that it should be as large as memory
    allows; a micro-batch of one completion has one advantage, and no covariance. Evaluation has the loss without them.

    Args:
        share: of a micro-batch's tokens, in (0, 1].
    """

    share: Annotated[float, Range(gt=0, le=1)] = 2e-4

    requires_api: ClassVar[str] = "1"
    trainers: ClassVar[tuple[str, ...]] = ("grpo",)
    cost: ClassVar[str] = "none that can be measured"
    unsupported: ClassVar[Mapping[str, str]] = {
        "accumulation": "The tokens are chosen within a micro-batch, so that its size decides which they are",
        "two_ranks": "The tokens are chosen within a micro-batch, into which each rank shuffles rollouts of its own",
    }

    def __post_init__(self) -> None:
        self._counts: list[Tensor] = []

    @hookimpl
    def check(self, run: RunDescription) -> None:
        """Refuse other policy terms than the clipped one, and micro-batches of one completion."""
        refuse_other_terms(run)
        if run.args.per_device_train_batch_size == 1:
            raise ValueError(
                "per_device_train_batch_size=1: all tokens of a micro-batch have the same advantage, so that their "
                "covariance with it is 0; raise it"
            )

    @hookimpl
    def setup(self) -> None:
        """Count anew in each training."""
        self._counts = []

    def chosen(self, tokens: PolicyTokens, scores: Tensor, among: Tensor) -> Tensor:
        """(B, T) bool: the share of the tokens that scores highest among those given, (B, T) each."""
        marked = highest(scores, among, self.share, tokens.mask)
        self._counts.append(torch.stack([marked.sum(), tokens.mask.sum()]).float())
        return marked

    @hookimpl
    def metrics(self, mode: str) -> dict[str, float]:
        """The share of tokens chosen since the last log, over all ranks. Collective."""
        if mode != "train" or not self._counts:
            return {}
        (chosen, tokens), self._counts = reduce(torch.stack(self._counts).sum(dim=0), "sum"), []
        return {"chosen": float(chosen / tokens.clamp(min=1))}
