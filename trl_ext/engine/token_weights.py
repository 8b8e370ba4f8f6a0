"""TRL's own token weights, found by differentiating its loss: masks, reduction and normaliser stay TRL's.

TRL's GRPO loss is sum_t w_t f(log_prob_t) + rest, with weights w_t made of masks, length normalisation, importance
correction and accumulation. With the log-probabilities as a leaf, on policy and advantages of -1, the policy term's
derivative at the leaf is exactly w_t.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class RolloutLogProbs:
    """Stands between TRL's loss and its forward: notes the log-probabilities, or hands back given ones."""

    def __init__(self) -> None:
        self.log_probs: Tensor
        self.entropy: Tensor
        self._given: tuple[Tensor, Tensor] | None = None

    def serve(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `_get_per_token_logps_and_entropies` returns: (log_probs, entropy, MoE loss)."""
        if self._given is not None:
            return (*self._given, None)
        log_probs, entropy, aux_loss = forward(*args, **kwargs)
        self.log_probs, self.entropy = log_probs, entropy
        return log_probs, entropy, aux_loss

    def give(self, log_probs: Tensor) -> None:
        """Serve these log-probabilities, with the entropy noted before, instead of running the model."""
        self._given = log_probs, self.entropy.detach()


def token_weights(compute_loss: Callable[..., Tensor], inputs: dict[str, Any], tap: RolloutLogProbs) -> Tensor:
    """(B, T) float: the weight of each token in TRL's policy term.

    Args:
        compute_loss: TRL's `_compute_loss`, with all other terms off.
        inputs: the micro-batch.
        tap: has seen the micro-batch's forward.
    """
    leaf = tap.log_probs.detach().requires_grad_()
    tap.give(leaf)
    # Without the old log-probabilities TRL takes the leaf's own, detached: the ratio is 1 and nothing is clipped.
    on_policy = {k: v for k, v in inputs.items() if k != "old_per_token_logps"}
    on_policy["advantages"] = -torch.ones(len(leaf), device=leaf.device)
    with torch.enable_grad():
        (weights,) = torch.autograd.grad(compute_loss(None, on_policy), leaf)
    return weights
