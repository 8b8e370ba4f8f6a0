"""The loss of one micro-batch in GRPO and RLOO: TRL's, with a plugin's policy term in place of the clipped one.

TRL's loss is a sum over tokens of a weight times the policy term, plus the rest,

    loss = sum_t w_t f(log_prob_t) + rest,

with weights w_t made of masks, length normalisation, importance correction and accumulation. The rest is TRL's loss
with zero advantages. The weights are found by differentiating TRL's loss: with the log-probabilities as a leaf, on
policy and with advantages of -1, the policy term's derivative at the leaf is exactly w_t. RLOO's policy term is that of
a whole completion, whose log-probability is its tokens' sum; w_t is one over the completions of the micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trl_ext.engine.context import AccumulationWindow, RunContext
from trl_ext.engine.losses import add_auxiliary_losses, token_loss_check
from trl_ext.records import MicroStep, PolicyTokens

Inputs = dict[str, Any]
TrlLoss = Callable[[Any, Inputs], Tensor]
"""TRL's `_compute_loss`, of the model and a micro-batch."""


@dataclass
class GRPOLoss:
    """What plugins make of TRL's `_compute_loss`, in training and evaluation."""

    run: RunContext
    policy_term_alone: Callable[[], AbstractContextManager[None]]
    """Gives a context in which TRL's KL, entropy and MoE terms are off, and its metrics go nowhere."""
    metrics: Callable[[], dict[str, list[float]]]
    """TRL's metrics of the interval, in the current mode."""
    gather: Callable[[Tensor], Tensor]
    loss_type: str | None
    """None in RLOO, which has one alone."""
    window: AccumulationWindow
    window_batches: Callable[[], Sequence[Inputs] | None]
    """Gives the micro-batches of the current window; None where some of them are still to be generated."""
    scaled: bool
    """Whether TRL's loss is divided by the window's micro-batches already; else transformers does it later."""
    _tap: _LogProbs | None = None

    def log_probs(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's `_get_per_token_logps_and_entropies`; within `loss` the forward is noted, or not run a second time."""
        return forward(*args, **kwargs) if self._tap is None else self._tap.serve(forward, *args, **kwargs)

    def loss(self, compute_loss: TrlLoss, model: nn.Module, inputs: Inputs) -> Tensor:
        """() the micro-batch's loss."""
        owned = self.run.plugins.implements("policy_loss")
        auxiliary = self.run.plugins.implements("auxiliary_losses") and self.run.training()
        if not owned and not auxiliary:
            return compute_loss(model, inputs)
        self._tap = tap = _LogProbs()
        try:
            loss = self._policy_loss(compute_loss, model, inputs, tap) if owned else compute_loss(model, inputs)
        finally:
            self._tap = None
        return self._with_auxiliary(loss, inputs, tap) if auxiliary else loss

    def _policy_loss(self, compute_loss: TrlLoss, model: nn.Module, inputs: Inputs, tap: _LogProbs) -> Tensor:
        # With zero advantages TRL's loss is everything but the policy term, with metrics and reduction its own.
        rest = compute_loss(model, {**inputs, "advantages": torch.zeros_like(inputs["advantages"])})
        with self.policy_term_alone():
            weights = _token_weights(compute_loss, inputs, tap)
        tokens = self._record(inputs, tap)
        check = token_loss_check(tokens.log_probs)
        loss = self.run.guard.exclusive("policy_loss", -tokens.log_probs, check=check, tokens=tokens)
        term = (weights * torch.where(tokens.mask, loss, torch.zeros_like(loss))).sum()
        self._correct_metrics(term.detach())
        return rest + term

    def _record(self, inputs: Inputs, tap: _LogProbs) -> PolicyTokens:
        advantages, old = inputs["advantages"], inputs.get("old_per_token_logps")
        return PolicyTokens(
            log_probs=tap.log_probs,
            old_log_probs=tap.log_probs.detach() if old is None else old,
            advantages=(advantages.unsqueeze(1) if advantages.dim() == 1 else advantages).expand_as(tap.log_probs),
            mask=loss_mask(inputs).bool(),
            entropy=tap.entropy.detach(),
            training=self.run.training(),
            progress=self.run.progress(),
            reference_log_probs=inputs.get("ref_per_token_logps"),
        )

    def _correct_metrics(self, term: Tensor) -> None:
        metrics = self.metrics()
        for name in [name for name in metrics if "clip_ratio" in name]:
            del metrics[name]  # of a term that is not used
        if metrics.get("policy_loss"):
            # TRL logs it where an entropy bonus is on; so far without this term, and before accumulation's share.
            by_token = self.loss_type in ("cispo", "dapo", "vespo") or not self.run.training()
            logged = term * (1 if by_token else self.run.accumulation_steps())
            metrics["policy_loss"][-1] += self.gather(logged).nanmean().item()

    def _with_auxiliary(self, loss: Tensor, inputs: Inputs, tap: _LogProbs) -> Tensor:
        run, accumulation = self.run, self.run.accumulation_steps()
        mask = loss_mask(inputs).bool()
        return add_auxiliary_losses(
            run,
            loss,
            MicroStep(inputs, tap.log_probs, tap.entropy, mask, run.step(), run.progress()),
            per_token=self._window_tokens(),
            per_sequence=len(inputs["completion_ids"]) * accumulation,
            per_batch=accumulation,
            divided_later=1 if self.scaled else accumulation,
        )

    def _window_tokens(self) -> Tensor | str:
        """() float: the window's label tokens as seen from one rank, or why they are not known. Collective.

        TRL counts those of a generation batch, of which a window has a share that differs from window to window.
        """
        if self.window.tokens is None:
            batches = self.window_batches()
            if batches is None:
                return (
                    "a window's label tokens are not known before its last completions are generated; make "
                    "steps_per_generation a multiple of gradient_accumulation_steps"
                )
            tokens = torch.stack([loss_mask(batch).sum() for batch in batches]).sum()
            self.window.tokens = self.run.sum_over_ranks(tokens.float()).clamp(min=1)
        return self.window.tokens / self.run.world_size


class _LogProbs:
    """Stands between TRL's loss and its forward: notes the log-probabilities, or hands back others."""

    log_probs: Tensor
    entropy: Tensor
    leaf: Tensor | None = None
    """Handed back, with the entropy noted before, instead of running the model."""

    def serve(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `_get_per_token_logps_and_entropies` returns: (log_probs, entropy, MoE loss)."""
        if self.leaf is not None:
            return self.leaf, self.entropy.detach(), None
        self.log_probs, self.entropy, aux_loss = forward(*args, **kwargs)
        return self.log_probs, self.entropy, aux_loss


def _token_weights(compute_loss: TrlLoss, inputs: Inputs, tap: _LogProbs) -> Tensor:
    """(B, T) float: the weight w_t of each token in TRL's policy term, of which `tap` has seen the forward."""
    tap.leaf = leaf = tap.log_probs.detach().requires_grad_()
    # Without the old log-probabilities TRL takes the leaf's own, detached: the ratio is 1 and nothing is clipped.
    on_policy = {k: v for k, v in inputs.items() if k != "old_per_token_logps"}
    if "old_logps" in on_policy:  # RLOO, which has them per completion
        on_policy["old_logps"] = (leaf.detach() * loss_mask(inputs)).sum(dim=1)
    on_policy["advantages"] = -torch.ones(len(leaf), device=leaf.device)
    with torch.enable_grad():
        (weights,) = torch.autograd.grad(compute_loss(None, on_policy), leaf)
    return weights


def loss_mask(batch: Mapping[str, Any]) -> Tensor:
    """(B, T) 0/1: the completion tokens that the loss sees; those that a tool wrote are left out."""
    mask: Tensor = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask
