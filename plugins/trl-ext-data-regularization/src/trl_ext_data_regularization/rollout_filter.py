"""`rollout-filter`: in GRPO, drop the completions whose policy gradient works against the target's.

    A_i <- A_i w_i,    w = filter(s),    s_i = <g_i, t>                (arXiv:2605.07063, policy gradient; IIF)

Once per generation batch and over all layers: g_i is the gradient of completion i's share of TRL's policy loss, t that
of the target loss on the generation batch itself or on fresh rollouts. `filter` keeps s_i >= 0 and drops the share
`frac` of the others, the most negative first. A zero advantage alone would leave TRL's denominators as they were, so
the kept ones get w_i = (total size) / (size of the kept ones), a completion's size being what it counts in that
denominator: its tokens, or 1. The update is then the policy gradient of the kept ones alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from trl_ext import hookimpl
from trl_ext.groups import group_advantages
from trl_ext.options import Range
from trl_ext.records import Rewards, Rollouts, RunDescription, SetupContext
from trl_ext_data_regularization.completion_gradients import CompletionGradients
from trl_ext_data_regularization.engines import Projections
from trl_ext_data_regularization.fresh_rollouts import HeldOut, roll_out
from trl_ext_data_regularization.ranks import gather_rows, in_two_parts, total_over_ranks, world_size
from trl_ext_data_regularization.solvers import Problem, Rule
from trl_ext_data_regularization.token_coefficients import (
    PolicyBatch,
    reward_loss,
    sizes,
    token_policy_gradient,
    train_loss,
)

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class RolloutFilter:
    """Scores each completion once per generation batch, s_i = <g_i, t>, and gives dropped ones an advantage of zero.

    The advantages of the kept completions are scaled up, so that the update is the policy gradient of the kept ones
    alone. Everything else is TRL's plain update.

    Args:
        target: "rollout": the generation batch itself (IIF), t = sum_i g_i; "prompts": fresh rollouts on held-out
            prompts.
        target_loss: what t is the gradient of. "reward", as in the authors' experiments: log-probabilities weighted by
            standardised rewards; "token-pg": the policy gradient as a mean over tokens; "train-loss": the policy
            gradient as TRL weighs tokens.
        frac: share of the completions with a negative score to drop, the most negative first.
        engine: "sketch": random projections; "direct": every completion's gradient, for LoRA and small models.
        prompts: target=prompts: data set of held-out prompts, path or hub id, with the columns that the reward needs.
        reward: target=prompts: reward function in TRL's form, "package.module:function" or "file.py:function".
        prompts_per_step: target=prompts: held-out prompts per rank and generation batch, in order, cycling.
        generations: target=prompts: completions per held-out prompt; at least 2 unless target_loss=reward.
        sketch_size: the projections' width per side.
        seed: of the projections and of the fresh rollouts.

    Raises:
        ValueError: two options contradict each other.
    """

    target: Literal["rollout", "prompts"] = "rollout"
    target_loss: Literal["train-loss", "token-pg", "reward"] = "reward"
    frac: Annotated[float, Range(ge=0, le=1)] = 1.0
    engine: Literal["sketch", "direct"] = "sketch"
    prompts: str | None = None
    reward: str | None = None
    prompts_per_step: Annotated[int, Range(ge=1)] = 8
    generations: Annotated[int, Range(ge=1)] = 8
    sketch_size: Annotated[int, Range(ge=1)] = 64
    seed: int = 0

    requires_api: ClassVar[str] = ">=1.5,<2"
    trainers: ClassVar[tuple[str, ...]] = ("grpo",)
    citation: ClassVar[str] = "Hu, Liu, Mao and Ma, Dr. Post-Training, arXiv:2605.07063 (policy gradient, IIF)"
    cost: ClassVar[str] = "a gradient of each completion; with target=prompts generation of theirs too"

    def __post_init__(self) -> None:
        if self.target == "prompts" and (self.prompts is None or self.reward is None):
            raise ValueError("target=prompts needs prompts=<path or hub id> and reward=<package.module:function>")
        if self.target == "rollout" and (self.prompts is not None or self.reward is not None):
            raise ValueError("prompts and reward belong to target=prompts; set that, or leave them out")
        if self.target == "prompts" and self.target_loss != "reward" and self.generations < 2:
            raise ValueError(
                f"generations={self.generations} with target_loss={self.target_loss}: a completion alone in its group "
                "has an advantage of zero, and nothing would be dropped; set generations to 2 or more, or "
                "target_loss=reward"
            )
        self._rule = Rule("filter", self.frac)
        self._kept: list[Tensor] = []
        self._target_rewards: list[Tensor] = []
        self._gradients: CompletionGradients | None = None
        self._position = 0

    # -- start-up ----------------------------------------------------------------------------------------------------

    @hookimpl
    def check(self, run: RunDescription) -> None:
        if run.sharding not in ("none", "ddp", "fsdp2"):
            raise ValueError(
                f"under {run.sharding} a completion's gradient cannot be had in each layer; use DDP or FSDP2"
            )
        if run.sharding == "fsdp2" and self.target == "prompts":
            raise ValueError(
                "target=prompts lets each rank sample by itself, and under fsdp2 a forward takes all ranks; use "
                "target=rollout, or DDP"
            )
        self._args = run.args
        if self.target == "prompts":
            assert self.prompts is not None
            assert self.reward is not None
            self._held_out = HeldOut.load(self.prompts, self.reward, self.prompts_per_step, run.world_size)

    @hookimpl
    def setup(self, context: SetupContext) -> None:
        if self._gradients is not None:
            self._gradients.remove()
        self._context, args = context, self._args
        projections = Projections(self.sketch_size, self.seed)
        self._gradients = CompletionGradients(
            context, self.engine, projections, args.temperature, args.per_device_train_batch_size
        )

    # -- one generation batch ----------------------------------------------------------------------------------------

    @hookimpl
    def advantages(self, rollouts: Rollouts, rewards: Rewards, advantages: Tensor) -> Tensor:
        """(N,) or (N, T): A_i w_i. NaN where a score is not finite: there is no order to drop by."""
        if not rollouts.training:
            return advantages
        batches = partial(self._batches, rollouts, rewards, advantages)
        g, t = in_two_parts(batches, self._vectors, collective=self._context.sharded)
        size = sizes(rollouts.mask, self._args.loss_type)
        target = total_over_ranks(torch.cat(t)).split([len(part) for part in t])
        scores = torch.stack([vectors @ part for vectors, part in zip(g, target, strict=True)]).sum(0)
        every, mine = torch.stack([scores, size], 1), slice(0, len(scores))
        if world_size() > 1:
            every, mine = gather_rows(every)
        problem = Problem(every[:, 0], every[:, 1])
        weights = self._rule.solve(problem, every.new_zeros(()), 0.0).weights[mine].to(advantages.dtype)
        self._note(weights, rollouts.step)
        return advantages * (weights if advantages.dim() == 1 else weights.unsqueeze(1))

    def _batches(self, rollouts: Rollouts, rewards: Rewards, advantages: Tensor) -> list[PolicyBatch]:
        """The completions of this rank, and those of the target where that takes others or another loss."""
        batches = [PolicyBatch.of(rollouts, train_loss(advantages, rollouts.mask, self._args.loss_type))]
        if self.target == "prompts":
            batches.append(self._fresh())
        elif self.target_loss != "train-loss":
            own, every = rewards.total[rewards.local], rewards.total
            coefficients = self._target_coefficients(own, advantages, rollouts.mask, every)
            batches.append(PolicyBatch.of(rollouts, coefficients))
        return batches

    def _vectors(self, batches: Sequence[PolicyBatch]) -> tuple[list[Tensor], list[Tensor]]:
        """Per layer (N, D) the completions' gradients, and (D,) this rank's part of t. Collective under FSDP2."""
        assert self._gradients is not None
        vectors = self._gradients.of(batches)
        n, last = len(batches[0]), len(batches[-1])
        return [v[:n] for v in vectors], [v[-last:].sum(0) for v in vectors]

    def _target_coefficients(
        self, rewards: Tensor, advantages: Tensor, mask: Tensor, every: Tensor | None = None
    ) -> Tensor:
        if self.target_loss == "reward":
            return reward_loss(rewards, mask, every)
        if self.target_loss == "token-pg":
            return token_policy_gradient(advantages, mask)
        return train_loss(advantages, mask, self._args.loss_type)

    def _fresh(self) -> PolicyBatch:
        """Fresh rollouts on this rank's next held-out prompts."""
        context, count = self._context, len(self._held_out.rows)
        start = self._position + context.rank * self.prompts_per_step
        self._position += context.world_size * self.prompts_per_step
        places = [(start + i) % count for i in range(self.prompts_per_step)]
        drawn = roll_out(context, self._held_out, places, self.generations, self._args, self.seed + start + 1)
        self._target_rewards.append(drawn.rewards.mean())
        groups = torch.arange(len(drawn.rewards), device=context.device) // self.generations
        advantages = group_advantages(drawn.rewards, groups, "group")
        coefficients = self._target_coefficients(drawn.rewards, advantages, drawn.mask)
        return PolicyBatch(
            drawn.prompt_ids, drawn.prompt_mask, drawn.completion_ids, drawn.mask, coefficients, drawn.mask
        )

    def _note(self, weights: Tensor, step: int) -> None:
        """Keep the share of completions kept, or say why there is none."""
        if torch.isfinite(weights).all():
            self._kept.append((weights != 0).float().mean())
        else:
            logger.warning(
                "rollout-filter: after step %d the scores <g_i, t> are NaN or infinite: the gradient of the target or "
                "of a completion is not finite, no completion can be chosen, and the advantages are NaN",
                step,
            )

    @hookimpl
    def metrics(self, mode: str) -> dict[str, float]:
        out: dict[str, float] = {}
        if mode == "train" and self._kept:
            out["kept"] = float(torch.stack(self._kept).mean())
            self._kept = []
        if mode == "train" and self._target_rewards:
            out["target_reward"] = float(torch.stack(self._target_rewards).mean())
            self._target_rewards = []
        return out

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Position in the held-out prompts."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there."""
        self._position = state["position"]
