"""`pg`: the plain policy gradient, without importance ratio and clipping (arXiv 2603.06957, outcome rewards).

For a prompt x and a completion y with the reward r the step is w <- w + eta r grad log p_w(y|x), so that a token has

    L_t = -eta A log p(y_t | x, y_<t),    A = r

where the options say what A and eta are; R is the weighted sum of the reward functions:

    rewards="binary"    A = 1[R > threshold]
    rewards="sign"      A = 2 * 1[R > threshold] - 1, the +1/-1 of the authors' experiments
    rewards="raw"       A = R
    baseline="group"    A <- A - mean of A over the group
    adaptive=true       eta = 1 / (4 + 2 |grad log p(y|x)|²) for each completion y; otherwise eta = 1
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from trl_ext import hookimpl
from trl_ext.groups import judged_total
from trl_ext.records import PolicyTokens, Rewards, Rollouts, RunDescription, SetupContext
from trl_ext_reachability.relations import ALONE, NEW_ADVANTAGES, declare

RewardForm = Literal["binary", "sign", "raw", "given"]
Baseline = Literal["none", "group"]


def adaptive_rate(squared_norm: Tensor, constant: float = 4.0, slope: float = 2.0) -> Tensor:
    """eta = 1 / (4 + 2 |grad log p|²), of any shape: with this rate the number of queries does not grow with the length
    (arXiv 2603.06957, outcome rewards; a constant rate costs a factor N)."""
    return 1 / (constant + slope * squared_norm)


def sequence_squared_norms(log_probs: Tensor, mask: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """(B,) squared norm of the gradient of each sequence's log-probability, on this rank; one backward a sequence.

    Args:
        log_probs: (B, T) float, differentiable; the graph stays.
        mask: (B, T) bool.
        parameters: those that are trained.
    """
    norms = []
    for row in torch.where(mask, log_probs, 0).sum(dim=1):
        gradients = torch.autograd.grad(row, parameters, retain_graph=True, allow_unused=True)
        present = [g.float().flatten() for g in gradients if g is not None]
        norms.append(torch.stack([g.dot(g) for g in present]).sum())
    return torch.stack(norms)


@dataclass(eq=False)
class PG:
    """The plain policy gradient -A log p in place of GRPO's clipped term.

    TRL's masks and reduction stay. With `loss_type="dr_grpo"` a token's weight is the same whatever the length, as in
    the paper's sum over a sequence.

    Args:
        rewards: "binary" (0/1), "sign" (-1/+1), "raw" (the weighted sum), or "given": advantages as they come, such as
            those of a process reward before this plugin.
        threshold: Reward above which a completion is correct ("binary" and "sign").
        baseline: "none", or "group": minus the group's mean, of the completions that a reward function judged.
        adaptive: Whether to scale each sequence by 1 / (4 + 2 |grad log p(y|x)|²), at one more backward a sequence.
            The rate of the paper is this factor at learning_rate=1 under SGD.
    """

    requires_api: ClassVar[str] = "1"
    trainers: ClassVar[tuple[str, ...]] = ("grpo",)
    citation: ClassVar[str] = (
        "Post-training with policy gradients: optimality and the base model barrier, arXiv 2603.06957"
    )
    cost: ClassVar[str] = "none that can be measured; with adaptive=true one more backward a sequence"
    provides: ClassVar[tuple[str, ...]] = (NEW_ADVANTAGES,)
    conflicts: ClassVar[Mapping[str, str]] = ALONE

    rewards: RewardForm = "binary"
    threshold: float = 0.5
    baseline: Baseline = "none"
    adaptive: bool = False

    def __post_init__(self) -> None:
        if self.rewards == "given" and self.baseline != "none":
            raise ValueError("baseline='group' has no rewards to work on with rewards='given'")
        if self.rewards in ("raw", "given") and self.threshold != type(self).threshold:
            raise ValueError(f"threshold={self.threshold}: rewards={self.rewards!r} has none; leave it out")
        if self.rewards == "given":
            declare(self, provides=(), conflicts={})
        self._parameters: list[nn.Parameter] = []
        self._rates: list[Tensor] = []

    @hookimpl
    def check(self, run: RunDescription) -> None:
        """Refuse what would need an importance ratio, or norms of sharded gradients."""
        if run.args.num_iterations > 1:
            raise ValueError(
                f"num_iterations={run.args.num_iterations} trains on rollouts of older weights, which the plain policy "
                "gradient does not correct for; set num_iterations=1"
            )
        if run.args.gradient_accumulation_steps % run.args.steps_per_generation:
            raise ValueError(
                f"steps_per_generation={run.args.steps_per_generation} with "
                f"gradient_accumulation_steps={run.args.gradient_accumulation_steps} trains on rollouts of older "
                "weights, which the plain policy gradient does not correct for; set both to the same number"
            )
        if self.adaptive and run.sharding not in ("none", "ddp"):
            raise ValueError(
                f"adaptive=True needs whole gradients of single sequences, which {run.sharding} shards; "
                "use the plugin adaptive-lr, or DDP"
            )

    @hookimpl
    def setup(self, context: SetupContext) -> None:
        """Take the parameters."""
        self._parameters = list(context.weights.parameters)

    @hookimpl
    def advantages(self, rollouts: Rollouts, rewards: Rewards, advantages: Tensor) -> Tensor:
        """(N,) float: A of each completion; 0 where every reward function returned None."""
        if self.rewards == "given":
            return advantages
        total = judged_total(rewards)
        judged = ~total.isnan()
        if self.rewards != "raw":
            correct = (total > self.threshold).to(advantages.dtype)
            total = correct if self.rewards == "binary" else 2 * correct - 1
        if self.baseline == "group":
            groups = torch.where(judged, total, torch.nan).view(-1, rollouts.num_generations)
            total = (groups - groups.nanmean(dim=1, keepdim=True)).flatten()
        return torch.where(judged, total, 0)[rewards.local].to(advantages.dtype)

    @hookimpl
    def policy_loss(self, tokens: PolicyTokens) -> Tensor:
        """Loss (B, T), -eta A log p of each token; over TRL's denominator for `loss_type`, times its token weights."""
        loss = -tokens.advantages * tokens.log_probs
        if not self.adaptive or not tokens.training:
            return loss
        rates = adaptive_rate(sequence_squared_norms(tokens.log_probs, tokens.mask, self._parameters))
        self._rates.append(rates)
        return rates.unsqueeze(1).to(loss.dtype) * loss

    @hookimpl
    def metrics(self, mode: str) -> dict[str, float]:
        """Mean adaptive rate of this rank's sequences since the last log."""
        if mode != "train" or not self._rates:
            return {}
        rates, self._rates = torch.cat(self._rates), []
        return {"rate": float(rates.mean())}
