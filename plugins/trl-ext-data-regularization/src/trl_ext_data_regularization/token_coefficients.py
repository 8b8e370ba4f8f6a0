"""Policy-gradient losses as coefficients of the tokens: loss = -sum_i sum_t c_it log pi(o_it), on policy.

On policy the ratio of probabilities is 1, nothing is clipped, and TRL's losses have the same gradient as these. A
function here gives c (N, T) for the N completions of one rank. Denominators that are one number for the whole batch are
left out, or are those of all ranks, so that the losses of several ranks add up: a choice by the sign and the order of
scores does not depend on them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trl_ext.records import Rollouts

TOKEN_MEAN = frozenset({"bnpo", "dapo", "cispo", "vespo"})
"""TRL's loss types that divide by the tokens of a batch; the others divide by its sequences."""


@dataclass(frozen=True)
class PolicyBatch:
    """Completions with the coefficient of each token's log-probability. N rows."""

    prompt_ids: Tensor
    """(N, P) long, padded on the left."""
    prompt_mask: Tensor
    """(N, P) 0/1."""
    completion_ids: Tensor
    """(N, T) long, padded on the right."""
    mask: Tensor
    """(N, T) 0/1: tokens that the loss sees."""
    coefficients: Tensor
    """(N, T) float; 0 where `mask` is."""
    completion_mask: Tensor
    """(N, T) 0/1: tokens that the model sees."""

    @classmethod
    def of(cls, rollouts: Rollouts, coefficients: Tensor) -> PolicyBatch:
        """The trainer's own completions. The model sees all up to the last token of the loss, tool results too."""
        return cls(
            prompt_ids=rollouts.prompt_ids,
            prompt_mask=rollouts.prompt_mask,
            completion_ids=rollouts.completion_ids,
            mask=rollouts.mask,
            coefficients=coefficients,
            completion_mask=(rollouts.mask.flip(1).cumsum(1).flip(1) > 0).long(),
        )

    def __len__(self) -> int:
        return len(self.completion_ids)

    def inputs(self, rows: slice) -> dict[str, Tensor]:
        """The model's inputs for some rows, with labels on the tokens that the loss sees."""
        ids = torch.cat([self.prompt_ids[rows], self.completion_ids[rows]], 1)
        attention = torch.cat([self.prompt_mask[rows], self.completion_mask[rows]], 1)
        labels = torch.full_like(ids, -100)
        seen = self.mask[rows].bool()
        labels[:, self.prompt_ids.shape[1] :][seen] = self.completion_ids[rows][seen]
        return {"input_ids": ids, "attention_mask": attention.long(), "labels": labels}


def sizes(mask: Tensor, loss_type: str) -> Tensor:
    """(N,) float: what each completion counts in the denominator of TRL's loss: its tokens, or 1."""
    return mask.sum(1).float() if loss_type in TOKEN_MEAN else torch.ones(len(mask), device=mask.device)


def train_loss(advantages: Tensor, mask: Tensor, loss_type: str) -> Tensor:
    """(N, T) float coefficients of TRL's policy loss: A_i / |o_i| for "grpo" and "sapo", A_i for the others.

    TRL divides the first by the number of completions, the token means (`TOKEN_MEAN`) by the tokens of the batch, and
    "dr_grpo" by a constant; these denominators are left out.

    Args:
        advantages: (N,) or (N, T).
        mask: (N, T) 0/1.
        loss_type: TRL's.
    """
    per_token = advantages if advantages.dim() == 2 else advantages.unsqueeze(1)
    weight = mask.float()
    if loss_type in ("grpo", "sapo"):
        weight = weight / mask.sum(1, keepdim=True).clamp(min=1)
    return per_token * weight


def token_policy_gradient(advantages: Tensor, mask: Tensor) -> Tensor:
    """(N, T) float coefficients A_i of the policy gradient as a mean over tokens (arXiv:2605.07063, "token-pg").

    Its denominator, the tokens of all ranks, is left out: no rank knows it alone.
    """
    return train_loss(advantages, mask, "dapo")


def reward_loss(rewards: Tensor, mask: Tensor, among: Tensor | None = None) -> Tensor:
    """(N, T) float coefficients of -(1/N) sum_i z(R_i) sum_t log pi(o_it) (arXiv:2605.07063, "reward").

    The sum over a completion's tokens is not divided by their number; N counts the completions of all ranks.

    Args:
        rewards: (N,); z standardises them, or subtracts 0.5 where they hardly spread (standard deviation below 1e-6).
        mask: (N, T) 0/1.
        among: rewards whose mean and spread standardise, those of all ranks; `rewards` where None.
    """
    every = rewards if among is None else among
    spread = every.std(unbiased=False)
    z = torch.where(spread < 1e-6, rewards - 0.5, (rewards - every.mean()) / spread.clamp(min=1e-6))
    return z.unsqueeze(1) * mask.float() / len(every)
