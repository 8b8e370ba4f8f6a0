"""The GRPO loss of one micro-batch: TRL's, with the policy term of a plugin in place of the clipped one.

TRL's loss is a sum over tokens of a weight times the policy term, plus the rest:

    loss = sum_t w_t f(log_prob_t) + rest

The rest is TRL's loss with zero advantages; the weights are TRL's too (`token_weights.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trl_ext.engine.context import RunContext
from trl_ext.engine.losses import add_auxiliary_losses, same_shape
from trl_ext.engine.token_weights import RolloutLogProbs, token_weights
from trl_ext.records import MicroStep, PolicyTokens

Inputs = dict[str, Any]


@dataclass(frozen=True)
class TrlLoss:
    """What is used of TRL's GRPO loss, beside calling it."""

    policy_term_alone: Callable[[], AbstractContextManager[None]]
    """Gives a context in which the KL, entropy and MoE terms are off, and metrics go nowhere."""
    metrics: Callable[[], dict[str, list[float]]]
    """The metrics of the interval, in the current mode."""
    gather: Callable[[Tensor], Tensor]
    loss_type: str
    steps_per_generation: int


class PolicyObjective:
    """What plugins make of TRL's `_compute_loss`, in training and evaluation.

    Args:
        run: the run.
        trl: what is used of TRL's loss.
    """

    def __init__(self, run: RunContext, trl: TrlLoss) -> None:
        self.run = run
        self.trl = trl
        self._tap: RolloutLogProbs | None = None

    def log_probs(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's `_get_per_token_logps_and_entropies`; within `loss` the forward is noted, or not run a second time."""
        return forward(*args, **kwargs) if self._tap is None else self._tap.serve(forward, *args, **kwargs)

    def loss(self, compute_loss: Callable[[Any, Inputs], Tensor], model: nn.Module, inputs: Inputs) -> Tensor:
        """() the micro-batch's loss.

        Args:
            compute_loss: TRL's `_compute_loss`.
            model, inputs: its arguments.
        """
        owned = self.run.plugins.implements("policy_loss")
        auxiliary = self.run.plugins.implements("auxiliary_losses") and self.run.training()
        if not owned and not auxiliary:
            return compute_loss(model, inputs)
        self._tap = tap = RolloutLogProbs()
        try:
            loss = self._policy_loss(compute_loss, model, inputs, tap) if owned else compute_loss(model, inputs)
        finally:
            self._tap = None
        return self._with_auxiliary(loss, inputs, tap) if auxiliary else loss

    def _policy_loss(
        self, compute_loss: Callable[[Any, Inputs], Tensor], model: nn.Module, inputs: Inputs, tap: RolloutLogProbs
    ) -> Tensor:
        # With zero advantages TRL's loss is everything but the policy term, with metrics and reduction its own.
        rest = compute_loss(model, {**inputs, "advantages": torch.zeros_like(inputs["advantages"])})
        log_probs, entropy = tap.log_probs, tap.entropy
        with self.trl.policy_term_alone():
            weights = token_weights(compute_loss, inputs, tap)
        tokens = self._record(inputs, log_probs, entropy)
        check = same_shape(log_probs)
        loss = self.run.guard.exclusive("policy_loss", -log_probs, check=check, tokens=tokens)
        term = (weights * torch.where(tokens.mask, loss, torch.zeros_like(loss))).sum()
        self._correct_metrics(term.detach())
        return rest + term

    def _record(self, inputs: Inputs, log_probs: Tensor, entropy: Tensor) -> PolicyTokens:
        advantages, old = inputs["advantages"], inputs.get("old_per_token_logps")
        return PolicyTokens(
            log_probs=log_probs,
            old_log_probs=log_probs.detach() if old is None else old,
            advantages=(advantages.unsqueeze(1) if advantages.dim() == 1 else advantages).expand_as(log_probs),
            mask=loss_mask(inputs).bool(),
            entropy=entropy.detach(),
            training=self.run.training(),
            progress=self.run.progress(),
            reference_log_probs=inputs.get("ref_per_token_logps"),
        )

    def _correct_metrics(self, term: Tensor) -> None:
        metrics = self.trl.metrics()
        for name in [name for name in metrics if "clip_ratio" in name]:
            del metrics[name]  # of a term that is not used
        if metrics.get("policy_loss"):
            # TRL logs it where an entropy bonus is on; so far without this term, and before accumulation's share.
            by_token = self.trl.loss_type in ("cispo", "dapo", "vespo") or not self.run.training()
            logged = term * (1 if by_token else self.run.accumulation_steps())
            metrics["policy_loss"][-1] += self.trl.gather(logged).nanmean().item()

    def _with_auxiliary(self, loss: Tensor, inputs: Inputs, tap: RolloutLogProbs) -> Tensor:
        run, mask, accumulation = self.run, loss_mask(inputs).bool(), self.run.accumulation_steps()
        micro_step = MicroStep(inputs, tap.log_probs, tap.entropy, mask, run.step(), run.progress())
        # TRL counts the tokens of a whole generation batch; one accumulation window has its share of them.
        tokens = inputs["num_items_in_batch"].clamp(min=1) / run.world_size
        return add_auxiliary_losses(
            run,
            loss,
            micro_step,
            per_token=tokens * accumulation / self.trl.steps_per_generation,
            per_sequence=len(inputs["completion_ids"]) * accumulation,
            per_batch=accumulation,
        )


def loss_mask(batch: Mapping[str, Any]) -> Tensor:
    """(B, T) 0/1: the completion tokens that the loss sees; those that a tool wrote are left out."""
    mask: Tensor = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask
