"""ReLIFT: prompts that no completion solves are buffered, and a full buffer gives a step of SFT between RL steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from trl_ext import hookimpl
from trl_ext.records import Rewards, Rollouts, RunDescription, SetupContext, WeightsView
from trl_ext_mixing.demonstrations import Demonstration, Demonstrations, refuse_company, refuse_unsupported
from trl_ext_mixing.parallel_averaging import clip_as_trl
from trl_ext_mixing.rewards import pass_rates, refuse_undecided


@dataclass(eq=False, kw_only=True)
class ReLIFT:
    """RL steps as ever; whenever the buffer is full, one more step of the same optimiser on its demonstrations.

    The step is taken right after an RL step, at that step's learning rate. Put plugins that follow the weights, such as
    averages, after this one.

    Args:
        demonstrations: column of the GRPO data set with the demonstration of each prompt.
        buffer_size: unsolved prompts, over all ranks, that make a step of SFT.
        batch_size: demonstrations per forward and rank; only memory depends on it.
        lr_ratio: learning rate of the SFT step over that of the RL step.
        max_grad_norm: norm to which the SFT gradient is clipped; the trainer's where None, 0 for no clipping.
        max_length: longest demonstration in tokens; not cut where None.
        reward: name of the reward function that says whether a completion solves its prompt; the weighted sum of all
            where empty.
        solved_at: value of that reward from which a completion counts as solved.
    """

    demonstrations: str = "completion"
    buffer_size: int = 64
    batch_size: int = 8
    lr_ratio: float = 1.0
    max_grad_norm: float | None = None
    max_length: int | None = None
    reward: str = ""
    solved_at: float = 1.0

    requires_api: ClassVar[str] = "1"
    trainers: ClassVar[tuple[str, ...]] = ("grpo",)
    state_version: ClassVar[int] = 1
    citation: ClassVar[str] = "Ma et al., Learning What Reinforcement Learning Can't (ReLIFT), arXiv:2506.07527"

    def __post_init__(self) -> None:
        for name in ("buffer_size", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"relift: {name}={getattr(self, name)} is not a number of demonstrations (1 or more)")
        if not self.lr_ratio > 0:
            raise ValueError(f"relift: lr_ratio={self.lr_ratio} is not above 0")
        if self.max_grad_norm is not None and self.max_grad_norm < 0:
            raise ValueError(f"relift: max_grad_norm={self.max_grad_norm} is not 0 or more")
        self._source: Demonstrations | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._max_norm = 0.0
        self._buffer: list[Demonstration] = []
        self._sft_steps = 0
        self._skipped = 0
        self._nonfinite = "raise"
        self._template: Mapping[str, Any] = {}
        self._nll: float | None = None

    @hookimpl
    def check(self, run: RunDescription) -> None:
        refuse_company(run, "relift")
        refuse_undecided(run, self.reward)
        refuse_unsupported(run, self.demonstrations, f"relift: demonstrations={self.demonstrations!r}")
        self._max_norm = float(run.args.max_grad_norm or 0.0) if self.max_grad_norm is None else self.max_grad_norm
        self._nonfinite = run.args.nonfinite or "raise"
        self._template = run.args.chat_template_kwargs or {}

    @hookimpl
    def setup(self, context: SetupContext) -> None:
        self._source = Demonstrations(context, self.demonstrations, self.max_length, self._template)
        self._buffer, self._sft_steps, self._skipped = [], 0, 0

    @hookimpl
    def wrap_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        self._optimizer = optimizer  # only to step it
        return optimizer

    @hookimpl
    def advantages(self, rollouts: Rollouts, rewards: Rewards, advantages: Tensor) -> Tensor:
        if not rollouts.training or self._source is None:
            return advantages
        rates = pass_rates(rewards, rollouts.num_generations, self.reward, self.solved_at)
        unsolved = list(self._source.of_prompts(rollouts, rewards, rates == 0).values())
        # The buffer is the same on all ranks, in the order of the prompts, so that all step together.
        world = self._source.context.world_size
        parts: list[list[Demonstration]] = [unsolved] * world
        if world > 1:
            dist.all_gather_object(parts, unsolved)
        for part in parts:
            self._buffer.extend(part)
        return advantages

    @hookimpl
    def weights_updated(self, weights: WeightsView, step: int, skipped: bool) -> None:
        while not skipped and len(self._buffer) >= self.buffer_size:
            batch, self._buffer = self._buffer[: self.buffer_size], self._buffer[self.buffer_size :]
            self._sft_step(batch)

    def _sft_step(self, batch: list[Demonstration]) -> None:
        source, optimizer = self._source, self._optimizer
        if source is None or optimizer is None:
            raise RuntimeError("the trainer has not set this plugin up")
        sft = source.gradient(batch[source.context.rank :: source.context.world_size], self.batch_size)
        if self._nonfinite != "ignore" and not torch.isfinite(sft.gradients.norm()):
            if self._nonfinite == "raise":
                raise ArithmeticError(
                    "NaN or infinite gradient of the buffered demonstrations; nonfinite='skip' leaves such steps out"
                )
            self._skipped += 1
            return
        gradients = dict(zip(sft.gradients.parameters, sft.gradients.tensors, strict=True))
        present = {p: g for p, g in gradients.items() if g is not None}
        clip_as_trl(present, self._max_norm)
        rates = [group["lr"] for group in optimizer.param_groups]
        try:
            for p, g in present.items():
                p.grad = g
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * self.lr_ratio
            optimizer.step()
        finally:
            for p in present:
                p.grad = None  # the RL gradient has been used by now
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr
        self._sft_steps += 1
        self._nll = sft.nll

    @hookimpl
    def metrics(self, mode: str) -> dict[str, float]:
        if mode != "train":
            return {}
        values = {
            "buffered": float(len(self._buffer)),
            "sft_steps": float(self._sft_steps),
            "skipped_sft_steps": float(self._skipped),
            "dropped_demonstrations": 0.0 if self._source is None else float(self._source.dropped),
        }
        if self._nll is not None:
            values["sft_nll"], self._nll = self._nll, None
        return values

    def state_dict(self) -> dict[str, Any]:
        """The buffered demonstrations and the number of SFT steps, the same on all ranks."""
        return {
            "buffer": [[d.start, *d.ids] for d in self._buffer],
            "sft_steps": self._sft_steps,
            "skipped_sft_steps": self._skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with a saved buffer."""
        self._buffer = [Demonstration(ids, start) for start, *ids in state["buffer"]]
        self._sft_steps, self._skipped = int(state["sft_steps"]), int(state["skipped_sft_steps"])
