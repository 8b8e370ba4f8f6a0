"""Parallel averaging: one RL and one SFT update from the same weights, each with its own optimiser state, averaged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from trl_ext import hookimpl
from trl_ext.gradients import GradientView
from trl_ext.records import Rewards, Rollouts, RunDescription, StreamGradient
from trl_ext_mixing.comparison import Comparison
from trl_ext_mixing.composite import BranchAverage, as_gradient
from trl_ext_mixing.schedule import scheduled
from trl_ext_mixing.two_gradients import TwoGradients


@dataclass(eq=False, kw_only=True)
class ParallelAveraging(TwoGradients):
    """theta <- theta + (1 - c) D_RL + c D_SFT, where each D is one step of its own optimiser from theta.

    This is the mean of the weights of two one-step branches (c = 1/2), and not one optimiser on the mean gradient:
    Adam's moments see each gradient at its own scale.

    Args:
        coefficient: c in [0, 1]; 0 is plain GRPO and 1 plain SFT. Published: 1/2.
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
    """

    coefficient: float = 0.5
    coefficient_end: float | None = None
    schedule: Literal["linear", "cosine"] = "linear"
    lr_ratio: float = 1.0
    max_grad_norm: float | None = None
    mode: Literal["updates", "gradients"] = "updates"
    skip_equal_rewards: bool = False

    method: ClassVar[str] = "parallel-averaging"
    citation: ClassVar[str] = "Bansal et al., RL Excursions during Pre-Training, arXiv:2606.04272"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("coefficient", "coefficient_end"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{self.method}: {name}={value} is not in [0, 1]")
        if self.schedule not in ("linear", "cosine"):
            raise ValueError(f"{self.method}: schedule={self.schedule!r} is not one of linear, cosine")
        if self.mode not in ("updates", "gradients"):
            raise ValueError(f"{self.method}: mode={self.mode!r} is not one of updates, gradients")
        if not self.lr_ratio > 0:
            raise ValueError(f"{self.method}: lr_ratio={self.lr_ratio} is not above 0")
        if self.max_grad_norm is not None and self.max_grad_norm < 0:
            raise ValueError(f"{self.method}: max_grad_norm={self.max_grad_norm} is not 0 or more")
        if self.mode == "gradients":
            for name, off in (("lr_ratio", 1.0), ("skip_equal_rewards", False)):
                if getattr(self, name) != off:
                    raise ValueError(
                        f"{self.method}: {name}={getattr(self, name)} needs two optimiser states; use mode=updates"
                    )
        self._optimizer: BranchAverage | None = None
        self._sft_max_norm = 0.0
        self._rewards_are_summed = True

    # -- hooks -------------------------------------------------------------------------------------------------------

    @hookimpl
    def check(self, run: RunDescription) -> None:
        super().check(run)
        self._sft_max_norm = self._max_grad_norm if self.max_grad_norm is None else self.max_grad_norm

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

    # -- the rule ----------------------------------------------------------------------------------------------------

    def mix(self, gradients: GradientView, sft: StreamGradient, both: Comparison) -> None:
        c = scheduled(self.coefficient, self.coefficient_end, self.progress, self.schedule)
        sft_gradients = {
            p: as_gradient(p, g)
            for p, g in zip(sft.gradients.parameters, sft.gradients.tensors, strict=True)
            if g is not None
        }
        clip_as_trl(sft_gradients, self._sft_max_norm)
        self.note(coefficient=c)
        if self._optimizer is None:
            rl = {p: p.grad for p in gradients.parameters if p.grad is not None}
            clip_as_trl(rl, self._max_grad_norm)
            gradients.mul_(1 - c).axpy_(c, sft.gradients)
            return
        self._optimizer.coefficient = c
        self._optimizer.skip_rl = self.skip_equal_rewards and not bool(both.norm_a)
        self._optimizer.give_sft(sft_gradients)
        if self.skip_equal_rewards:
            self.note(skipped_rl=float(self._optimizer.skip_rl))


def clip_as_trl(gradients: Mapping[nn.Parameter, Tensor], max_norm: float) -> None:
    """Clip gradients in place by the very function that TRL's trainer uses on `p.grad`; 0 leaves them."""
    if max_norm <= 0:
        return
    before: dict[nn.Parameter, Tensor | None] = {p: p.grad for p in gradients}
    try:
        for p, g in gradients.items():
            p.grad = g
        torch.nn.utils.clip_grad_norm_(list(gradients), max_norm)
    finally:
        for p, old in before.items():
            p.grad = old
