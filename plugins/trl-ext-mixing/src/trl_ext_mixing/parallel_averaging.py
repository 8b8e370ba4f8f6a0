"""Parallel averaging (arXiv:2606.04272): an RL and an SFT update from the same weights, averaged.

    D_RL,  state_RL  = OptUpdate(g_RL,  state_RL,  lr)
    D_SFT, state_SFT = OptUpdate(g_SFT, state_SFT, lr * lr_ratio)
    theta <- theta + (1 - c) D_RL + c D_SFT                          c = 1/2 as published

Both gradients are taken at the same theta, and each is clipped on its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from trl_ext import hookimpl
from trl_ext.gradients import GradientView
from trl_ext.options import Range
from trl_ext.records import Rewards, Rollouts, StreamGradient
from trl_ext.schedules import Schedule
from trl_ext_mixing.comparison import Comparison
from trl_ext_mixing.composite import BranchAverage
from trl_ext_mixing.optimizer_gradients import by_parameter, clip_as_trl
from trl_ext_mixing.two_gradients import TwoGradients


@dataclass(eq=False, kw_only=True)
class ParallelAveraging(TwoGradients):
    """theta <- theta + (1 - c) D_RL + c D_SFT, where each D is one step of its own optimiser from theta.

    This is the mean of the weights of two one-step branches (c = 1/2), and not one optimiser on the mean gradient:
    Adam's moments see each gradient at its own scale.

    Args:
        coefficient: c in [0, 1]; 0 is the plain trainer and 1 plain SFT. Published: 1/2.
        coefficient_end: c at the end of the run; `coefficient` throughout where None.
        schedule: how c moves from `coefficient` to `coefficient_end`: "linear" or "cosine" in the share of steps done.
        lr_ratio: learning rate of the SFT branch over the trainer's, which is that of the RL branch.
        max_grad_norm: norm to which the SFT gradient is clipped on its own; the trainer's `max_grad_norm` where None,
            0 for no clipping. TRL clips the RL gradient.
        mode: "updates" is the published rule; "gradients" averages the two gradients, each clipped on its own, and
            steps one optimiser (for comparison).
        skip_equal_rewards: leave out the RL half in steps where all groups had equal rewards. GRPO's gradient is zero
            there, but the momentum of the RL branch would still move the weights. A step with a KL term or an entropy
            bonus has a gradient of its own, and is not left out.

    Raises:
        ValueError: options that exclude each other.
    """

    coefficient: Annotated[float, Range(ge=0, le=1)] = 0.5
    coefficient_end: Annotated[float, Range(ge=0, le=1)] | None = None
    schedule: Literal["linear", "cosine"] = "linear"
    lr_ratio: Annotated[float, Range(gt=0)] = 1.0
    max_grad_norm: Annotated[float, Range(ge=0)] | None = None
    mode: Literal["updates", "gradients"] = "updates"
    skip_equal_rewards: bool = False

    method: ClassVar[str] = "parallel-averaging"
    of_rewards: ClassVar[tuple[str, ...]] = (*TwoGradients.of_rewards, "skip_equal_rewards")
    citation: ClassVar[str] = "Bansal et al., RL Excursions during Pre-Training, arXiv:2606.04272"
    cost: ClassVar[str] = "an SFT step on the demonstrations, a second pair of moments, and a gradient"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, off in (("lr_ratio", 1.0), ("skip_equal_rewards", False)):
            if self.mode == "gradients" and getattr(self, name) != off:
                raise ValueError(
                    f"{self.method}: {name}={getattr(self, name)} needs two optimiser states; use mode=updates"
                )
        self._optimizer: BranchAverage | None = None

    # -- the rule ----------------------------------------------------------------------------------------------------

    def mix(self, gradients: GradientView, sft: StreamGradient, both: Comparison) -> None:
        end = self.coefficient if self.coefficient_end is None else self.coefficient_end
        c = Schedule(self.schedule, self.coefficient, end)(self.progress)
        self.note(coefficient=c)
        g_sft = by_parameter(sft.gradients)
        clip_as_trl(g_sft, self.trainers_max_norm if self.max_grad_norm is None else self.max_grad_norm)
        if self._optimizer is None:
            self._average_gradients(gradients, sft.gradients, c)
        else:
            no_rl = self.skip_equal_rewards and not bool(both.norm_a)
            self._average_updates(self._optimizer, g_sft, c, no_rl)

    def _average_updates(
        self, optimizer: BranchAverage, g_sft: Mapping[nn.Parameter, Tensor], c: float, no_rl: bool
    ) -> None:
        """Leave g_RL in place for the RL branch, and give the optimiser what the SFT branch needs."""
        optimizer.coefficient = c
        optimizer.skip_rl = no_rl
        optimizer.give_sft(g_sft)
        if self.skip_equal_rewards:
            self.note(skipped_rl=float(no_rl))

    def _average_gradients(self, gradients: GradientView, g_sft: GradientView, c: float) -> None:
        """g <- (1 - c) g_RL + c g_SFT for one optimiser, each clipped on its own."""
        clip_as_trl({p: p.grad for p in gradients.parameters if p.grad is not None}, self.trainers_max_norm)
        gradients.mul_(1 - c).axpy_(c, g_sft)

    # -- hooks -------------------------------------------------------------------------------------------------------

    @hookimpl
    def wrap_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        if self.mode == "gradients":
            return optimizer
        self._optimizer = BranchAverage(optimizer, self.lr_ratio)
        return self._optimizer

    @hookimpl
    def advantages(self, rollouts: Rollouts, rewards: Rewards, advantages: Tensor) -> Tensor:
        super().advantages(rollouts, rewards, advantages)
        if self.skip_equal_rewards and self.no_signal(rollouts, rewards):
            return torch.zeros_like(advantages)  # exactly zero, it shows in the gradient
        return advantages

    @hookimpl
    def metrics(self, mode: str) -> dict[str, float]:
        values = super().metrics(mode)
        if mode == "train" and self._optimizer is not None:
            values |= self._optimizer.updates.read()
        return values
