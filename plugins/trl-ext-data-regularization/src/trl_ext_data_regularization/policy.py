"""Policy-gradient losses as per-token coefficients: loss = -sum_t c_t log pi_t, at the policy that generated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
    """(N,) what each sample counts in the loss's denominator: its tokens, or 1."""
    return mask.sum(1).float() if loss_type in TOKEN_MEAN else torch.ones(len(mask), device=mask.device)


def train_loss(advantages: Tensor, mask: Tensor, loss_type: str) -> Tensor:
    """(N, T) coefficients of TRL's policy loss on policy, but for its constant denominator.

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
    """(N, T) coefficients of the token-mean policy gradient, A_i, but for its denominator: the tokens of all ranks.

    No rank knows these alone, and a choice by signs and order does not depend on them.
    """
    return train_loss(advantages, mask, "dapo")


def reward_loss(rewards: Tensor, mask: Tensor, among: Tensor | None = None) -> Tensor:
    """(N, T) coefficients of -(1/N) sum_i z(R_i) sum_t log pi_t (arXiv:2605.07063).

    Args:
        rewards: (N,); z standardises them, or subtracts 0.5 where they hardly spread (standard deviation below 1e-6).
        mask: (N, T) 0/1.
        among: rewards whose mean and spread standardise, those of all ranks; `rewards` where None.
    """
    every = rewards if among is None else among
    spread = every.std(unbiased=False)
    z = torch.where(spread < 1e-6, rewards - 0.5, (rewards - every.mean()) / spread.clamp(min=1e-6))
    return z.unsqueeze(1) * mask.float() / len(every)


def group_advantages(rewards: Tensor, group: int) -> Tensor:
    """(N,) rewards minus their group's mean, over its standard deviation plus 1e-4, as TRL's default."""
    grouped = rewards.view(-1, group)
    centred = grouped - grouped.mean(1, keepdim=True)
    return (centred / (grouped.std(1, keepdim=True) + 1e-4)).flatten() if group > 1 else centred.flatten()
