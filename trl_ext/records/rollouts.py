"""Records of GRPO and RLOO: completions, rewards, and the tokens of the policy term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rollouts:
    """This rank's completions (`advantages`). N rows: the generation batch in training, the batch in evaluation."""

    inputs: Sequence[Mapping[str, Any]]
    """N rows of the data set, prompts repeated once per generation."""
    prompts: Sequence[Any]
    completions: Sequence[Any]
    """Text, or messages for conversational data."""
    prompt_ids: Tensor
    """(N, P) long, padded on the left."""
    prompt_mask: Tensor
    """(N, P) 0/1."""
    completion_ids: Tensor
    """(N, T) long, padded on the right."""
    mask: Tensor
    """(N, T) 0/1: the tokens that the loss sees (tool results and masked truncated completions are 0)."""
    num_generations: int
    step: int
    """Optimiser steps already done."""
    training: bool
    old_log_probs: Tensor | None = None
    """(N, T) float, where TRL computed them; in RLOO always."""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """(N,) float or long each: the columns that plugins declare, of the rows in `inputs` (new in 1.4)."""
    entropy: Tensor | None = None
    """(N, T) float, in nats: entropy of each next-token distribution under the policy that the update starts from, at
    the trainer's temperature; where a plugin names "entropy" in its `rollout_outputs` (new in 1.5)."""


@dataclass(frozen=True)
class Rewards:
    """Rewards of all ranks as the functions gave them, before RLOO clips them and adds its KL term (`advantages`)."""

    per_function: Tensor
    """(N x ranks, F) float; NaN where a function returned None."""
    names: tuple[str, ...]
    weights: Tensor
    """(F,) float."""
    local: slice
    """The rows of this rank."""

    @property
    def total(self) -> Tensor:
        """(N x ranks,) float: weighted sum over the functions, NaN ignored."""
        return (self.per_function * self.weights.to(self.per_function.device)).nansum(dim=1)


@dataclass(frozen=True)
class PolicyTokens:
    """One micro-batch of GRPO or RLOO (`policy_loss`)."""

    log_probs: Tensor
    """(B, T) float, differentiable, at the trainer's temperature."""
    old_log_probs: Tensor
    """(B, T) float: of the policy that generated; `log_probs` detached on policy."""
    advantages: Tensor
    """(B, T) float; in RLOO the same for all tokens of a completion."""
    mask: Tensor
    """(B, T) bool."""
    entropy: Tensor
    """(B, T) float, in nats."""
    training: bool
    progress: float
    reference_log_probs: Tensor | None = None
    """(B, T) float, where the trainer has a reference (`beta` > 0)."""
