"""The tokens of all ranks' completions, for methods that compare the completions of a group token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate.utils import gather, pad_across_processes
from torch import Tensor

from trl_ext.ranks import on_every_rank
from trl_ext.records import Rollouts


@dataclass(frozen=True)
class AllTokens:
    """N rows of all ranks, in the order of the ranks, and as many positions T as the longest completion has."""

    ids: Tensor
    """(N, T) long; -1 where the mask is False."""
    mask: Tensor
    """(N, T) bool: the tokens that the loss sees."""
    entropy: Tensor
    """(N, T) float, in nats; 0 where the mask is False."""

    @classmethod
    def of(cls, rollouts: Rollouts) -> AllTokens:
        """Those of this rank's rollouts, which carry their entropy, and of the other ranks'. Collective."""

        def mine() -> tuple[Tensor, ...]:
            assert rollouts.entropy is not None, "declared in rollout_outputs"
            mask = rollouts.mask.bool()
            return rollouts.completion_ids.masked_fill(~mask, -1), torch.where(mask, rollouts.entropy.float(), 0)

        ids, entropy = (
            gather(pad_across_processes(part, dim=1, pad_index=fill))
            for part, fill in zip(on_every_rank(mine), (-1, 0), strict=True)
        )
        return cls(ids, ids >= 0, entropy)

    def mean_entropy(self) -> Tensor:
        """(N,) float: of each completion; 0 where it has no token."""
        return self.entropy.sum(dim=1) / self.mask.sum(dim=1).clamp(min=1)


def all_advantages(advantages: Tensor) -> Tensor:
    """(N x ranks,) float: the advantages of all ranks' completions. Collective.

    Raises:
        ValueError: a plugin before has made them advantages per token, (N, T).
    """

    def one_each() -> Tensor:
        if advantages.dim() != 1:
            raise ValueError("it takes one advantage per completion, and a plugin before it gives one per token")
        return advantages

    return gather(on_every_rank(one_each))
