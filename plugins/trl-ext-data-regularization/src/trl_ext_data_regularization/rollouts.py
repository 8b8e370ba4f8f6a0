"""`rollout-filter`: in GRPO, drop the completions whose policy gradient works against the target's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from trl_ext import hookimpl
from trl_ext.records import Rewards, Rollouts, RunDescription, SetupContext
from trl_ext_data_regularization.checks import refuse_unknown_choices
from trl_ext_data_regularization.engines import Direct, Projections, Sketch
from trl_ext_data_regularization.fresh_rollouts import load_function, load_prompts, rewards_of, roll_out
from trl_ext_data_regularization.layers import Batch, find_layers
from trl_ext_data_regularization.policy import (
    PolicyBatch,
    group_advantages,
    reward_loss,
    sizes,
    token_policy_gradient,
    train_loss,
)
from trl_ext_data_regularization.ranks import FailedElsewhere, gather_rows, together, total_over_ranks, world_size
from trl_ext_data_regularization.solvers import Problem, Rule
from trl_ext_data_regularization.taps import Taps
from trl_ext_data_regularization.visitors import ScorePass


@dataclass(eq=False)
class RolloutFilter:
    """Scores each completion once per generation batch, s_i = <g_i, t>, and gives dropped ones an advantage of zero.

    That leaves TRL's denominators as they were, so the advantages of the kept completions are scaled up: the update is
    the policy gradient of the kept ones alone. Everything else is TRL's plain update.

    Args:
        target: "rollout": the generation batch itself (IIF), t = sum_i g_i; "prompts": fresh rollouts on held-out
            prompts.
        target_loss: what t is the gradient of. "train-loss": the policy gradient as TRL weighs tokens; "token-pg": as a
            mean over tokens; "reward": log-probabilities weighted by standardised rewards.
        frac: share of the completions with a negative score to drop, the most negative first.
        engine: "sketch": random projections; "direct": every completion's gradient, for LoRA and small models.
        prompts: target=prompts: data set of held-out prompts, path or hub id, with the columns that the reward needs.
        reward: target=prompts: reward function in TRL's form, as "package.module:function".
        prompts_per_step: target=prompts: held-out prompts per rank and generation batch, in order, cycling.
        generations: target=prompts: completions per held-out prompt; at least 2 unless target_loss=reward.
        sketch_size: the projections' width per side.
        seed: of the projections and of the fresh rollouts.
    """

    target: Literal["rollout", "prompts"] = "rollout"
    target_loss: Literal["train-loss", "token-pg", "reward"] = "train-loss"
    frac: float = 1.0
    engine: Literal["sketch", "direct"] = "sketch"
    prompts: str | None = None
    reward: str | None = None
    prompts_per_step: int = 8
    generations: int = 8
    sketch_size: int = 64
    seed: int = 0

    requires_api: ClassVar[str] = "1"
    trainers: ClassVar[tuple[str, ...]] = ("grpo",)
    citation: ClassVar[str] = "Hu, Liu, Mao and Ma, Dr. Post-Training, arXiv:2605.07063 (policy gradient, IIF)"

    def __post_init__(self) -> None:
        refuse_unknown_choices(self)
        if not 0 <= self.frac <= 1:
            raise ValueError(f"frac={self.frac}: allowed is [0, 1]")
        for name in ("prompts_per_step", "generations", "sketch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1")
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
        self._taps: Taps | None = None
        self._position = 0

    # -- start-up ----------------------------------------------------------------------------------------------------

    @hookimpl
    def check(self, run: RunDescription) -> None:
        if run.sharding not in ("none", "ddp"):
            raise ValueError(f"under {run.sharding} no rank sees whole layers; use DDP")
        self._args = run.args
        self._held_out: Any = None
        if self.target == "prompts":
            self._reward = load_function(self.reward or "")
            self._held_out = load_prompts(self.prompts or "")
            if "prompt" not in self._held_out.column_names:
                raise ValueError(
                    f"prompts={self.prompts} has no column 'prompt' ({', '.join(self._held_out.column_names)})"
                )
            if len(self._held_out) < self.prompts_per_step * run.world_size:
                raise ValueError(
                    f"prompts={self.prompts} has {len(self._held_out)} rows, fewer than prompts_per_step="
                    f"{self.prompts_per_step} on {run.world_size} rank(s); lower prompts_per_step"
                )

    @hookimpl
    def setup(self, context: SetupContext) -> None:
        if self._taps is not None:
            self._taps.remove()
        self._context = context
        self._layers, uses = find_layers(context.model, context.names)
        self._taps = Taps(context.model, uses, self._args.temperature)
        self._projections = Projections(self.sketch_size, self.seed)

    # -- one generation batch ----------------------------------------------------------------------------------------

    @hookimpl
    def advantages(self, rollouts: Rollouts, rewards: Rewards, advantages: Tensor) -> Tensor:
        if not rollouts.training:
            return advantages
        try:
            s, t, count = together(lambda: self._sketches(rollouts, rewards, advantages), self._context.device)
        except FailedElsewhere:
            return advantages
        target = total_over_ranks(torch.cat(t)).split([len(part) for part in t])
        scores = torch.stack([z @ part for z, part in zip(s, target, strict=True)]).sum(0)
        every, mine = torch.stack([scores, count], 1), slice(0, len(scores))
        if world_size() > 1:
            every, mine = gather_rows(every)
        problem = Problem(every[:, 0], every[:, 1])
        weights = self._rule.solve(problem, every.new_zeros(()), 0.0).weights[mine].to(advantages.dtype)
        self._kept.append((weights != 0).float().mean())
        return advantages * (weights if advantages.dim() == 1 else weights.unsqueeze(1))

    def _sketches(
        self, rollouts: Rollouts, rewards: Rewards, advantages: Tensor
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Per layer (N, D) the completions' gradients and (D,) this rank's part of t; (N,) what each counts."""
        loss_type = self._args.loss_type
        batches = [_batch(rollouts, train_loss(advantages, rollouts.mask, loss_type))]
        if self.target == "prompts":
            batches.append(self._fresh())
        elif self.target_loss != "train-loss":
            own, every = rewards.total[rewards.local], rewards.total
            batches.append(_batch(rollouts, self._target_coefficients(own, advantages, rollouts.mask, every)))
        vectors = self._vectors(batches)
        n, last = len(batches[0]), len(batches[-1])
        return [v[:n] for v in vectors], [v[-last:].sum(0) for v in vectors], sizes(rollouts.mask, loss_type)

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
        context, args, n = self._context, self._args, len(self._held_out)
        start = self._position + context.rank * self.prompts_per_step
        self._position += context.world_size * self.prompts_per_step
        indices = [(start + i) % n for i in range(self.prompts_per_step) for _ in range(self.generations)]
        rows = self._held_out.select(indices)
        options = {
            "max_new_tokens": args.max_completion_length,
            "do_sample": True,
            "temperature": args.temperature,
            "top_p": args.top_p,
            "top_k": args.top_k,
            "pad_token_id": context.tokenizer.pad_token_id,
            "eos_token_id": context.tokenizer.eos_token_id,
        }
        seed = self.seed + start + 1
        prompt_ids, prompt_mask, ids, mask = roll_out(context.model, context.tokenizer, rows["prompt"], options, seed)
        found = rewards_of(self._reward, rows, context.tokenizer, ids, mask)
        self._target_rewards.append(found.mean())
        advantages = group_advantages(found, self.generations)
        coefficients = self._target_coefficients(found, advantages, mask)
        return PolicyBatch(prompt_ids, prompt_mask, ids, mask, coefficients, mask)

    def _vectors(self, batches: list[PolicyBatch]) -> list[Tensor]:
        """Per layer, (rows of all batches, D) each row's gradient or its sketch."""
        total, device = sum(map(len, batches)), self._context.device
        none: list[Tensor | None] = [None] * len(self._context.names)
        engine = (
            Direct(self._layers, none, total, device)
            if self.engine == "direct"
            else Sketch(self._layers, none, total, device, self._projections)
        )
        offset = 0
        for batch in batches:
            for start in range(0, len(batch), self._args.per_device_train_batch_size):
                rows = slice(start, min(start + self._args.per_device_train_batch_size, len(batch)))
                self._pass(engine, batch, rows, offset + start)
            offset += len(batch)
        return [engine.vectors(layer) for layer in range(len(self._layers))]

    def _pass(self, engine: Direct | Sketch, batch: PolicyBatch, rows: slice, offset: int) -> None:
        """Forward and backward of some rows, unwrapped: no counter, metric, gradient or random state moves."""
        assert self._taps is not None
        context, inputs = self._context, batch.inputs(rows)
        index = torch.arange(rows.stop - rows.start, device=context.device).unsqueeze(1).expand_as(inputs["input_ids"])
        devices = [context.device] if context.device.type != "cpu" else []
        kind = context.device.type if devices else "cuda"
        scoring = self._taps.active(ScorePass(engine), Batch(index, len(index), offset, True))
        with torch.random.fork_rng(devices=devices, device_type=kind), torch.enable_grad(), scoring:
            output = context.model(**inputs, use_cache=False, fused_lm_head=True)
            log_probs = output.log_probs[:, -batch.mask.shape[1] :]
            (-(log_probs * batch.coefficients[rows])).sum().backward()

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


def _batch(rollouts: Rollouts, coefficients: Tensor) -> PolicyBatch:
    # What the model sees reaches to the last token of the loss; tool results in between belong to it.
    seen = (rollouts.mask.flip(1).cumsum(1).flip(1) > 0).long()
    return PolicyBatch(
        prompt_ids=rollouts.prompt_ids,
        prompt_mask=rollouts.prompt_mask,
        completion_ids=rollouts.completion_ids,
        mask=rollouts.mask,
        coefficients=coefficients,
        completion_mask=seen,
    )
