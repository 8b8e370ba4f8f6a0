"""ReLIFT (arXiv:2506.07527): steps of GRPO, and between them steps of SFT on the prompts that RL does not solve.

    each step        theta  <- step of the optimiser on grad L_GRPO
                     buffer <- buffer + {prompts that none of their completions solves}
    |buffer| >= M    theta  <- step of the optimiser on grad L_SFT of the M oldest, which leave the buffer

    L_SFT = -1/T sum log p

T counts the label tokens of those M demonstrations, over all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from trl_ext import hookimpl
from trl_ext.options import Range
from trl_ext.records import Rewards, Rollouts, RunDescription, SetupContext, WeightsView
from trl_ext_mixing.demonstrations import Demonstration
from trl_ext_mixing.optimizer_gradients import by_parameter, clip_as_trl, extra_step
from trl_ext_mixing.unsolved import UnsolvedPrompts


@dataclass(eq=False, kw_only=True)
class ReLIFT(UnsolvedPrompts):
    """RL steps as ever; when the buffer is full after one, one more step of the same optimiser on its demonstrations.

    As in the authors' code (github.com/TheRoadQaQ/ReLIFT) there is at most one SFT step after an RL step, on the 64
    that have waited longest; the buffer grows while more than that are unsolved in each step. (Their first release took
    the newest first.) Different from theirs: they step an Adam of its own for SFT, with its own learning rate, and this
    one is the trainer's, at the learning rate of the RL step that it follows; their scripts clip both gradients at 0.5,
    leave out SFT steps above a given gradient norm, and some have a small entropy bonus.

    Put plugins that follow the weights, such as averages, after this one.

    Args:
        buffer_size: M, unsolved prompts over all ranks that make a step of SFT.
        batch_size: demonstrations per forward and rank; only memory depends on it.
        lr_ratio: learning rate of the SFT step over that of the RL step.
        max_grad_norm: norm to which the SFT gradient is clipped; the trainer's where None, 0 for no clipping.
        demonstrations, max_length, reward, solved_at: as in `UnsolvedPrompts`.
    """

    buffer_size: Annotated[int, Range(ge=1)] = 64
    batch_size: Annotated[int, Range(ge=1)] = 8
    lr_ratio: Annotated[float, Range(gt=0)] = 1.0
    max_grad_norm: Annotated[float, Range(ge=0)] | None = None

    unsupported: ClassVar[Mapping[str, str]] = {
        "fsdp2": "Each rank makes as many passes as it has demonstrations, and shards are gathered only in passes that "
        "all ranks make; hpt, which trains on the demonstrations in the loss, runs under FSDP2"
    }
    method: ClassVar[str] = "relift"
    state_version: ClassVar[int] = 1
    citation: ClassVar[str] = "Ma et al., Learning What Reinforcement Learning Can't (ReLIFT), arXiv:2506.07527"
    cost: ClassVar[str] = "an SFT step each time enough prompts are collected"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._optimizer: torch.optim.Optimizer
        self._max_norm = 0.0
        self._nonfinite = "raise"
        self._buffer: list[Demonstration] = []
        self._sft_steps = self._skipped = 0

    # -- the rule ----------------------------------------------------------------------------------------------------

    @hookimpl
    def advantages(self, rollouts: Rollouts, rewards: Rewards, advantages: Tensor) -> Tensor:
        if rollouts.training:
            unsolved = self.pass_rates(rollouts, rewards) == 0  # False where nobody judged: NaN
            found = self.source.of_prompts(rollouts, rewards, unsolved)
            self._buffer.extend(self._of_all_ranks(list(found.values())))
        return advantages

    @hookimpl
    def weights_updated(self, weights: WeightsView, step: int, skipped: bool) -> None:
        if not skipped and len(self._buffer) >= self.buffer_size:
            batch, self._buffer = self._buffer[: self.buffer_size], self._buffer[self.buffer_size :]
            self._sft_step(batch)

    def _sft_step(self, batch: list[Demonstration]) -> None:
        context = self.source.context
        sft = self.source.gradient(batch[context.rank :: context.world_size], self.batch_size)
        if self._nonfinite != "ignore" and not torch.isfinite(sft.gradients.norm()):
            self._leave_out()
            return
        gradients = by_parameter(sft.gradients)
        clip_as_trl(gradients, self._max_norm)
        extra_step(self._optimizer, gradients, self.lr_ratio)
        self._sft_steps += 1
        self.means.add(sft_nll=sft.nll)

    def _leave_out(self) -> None:
        if self._nonfinite == "raise":
            raise ArithmeticError(
                "NaN or infinite gradient of the buffered demonstrations; nonfinite='skip' leaves such steps out"
            )
        self._skipped += 1

    def _of_all_ranks(self, mine: list[Demonstration]) -> list[Demonstration]:
        """In the order of the prompts, the same on all ranks, so that all step together. Collective."""
        world = self.source.context.world_size
        if world == 1:
            return mine
        gathered: list[list[Demonstration]] = [[]] * world
        dist.all_gather_object(gathered, mine)
        return [demonstration for part in gathered for demonstration in part]

    # -- the run -----------------------------------------------------------------------------------------------------

    @hookimpl
    def check(self, run: RunDescription) -> None:
        super().check(run)
        self._max_norm = float(run.args.max_grad_norm or 0.0) if self.max_grad_norm is None else self.max_grad_norm
        self._nonfinite = run.args.nonfinite or "raise"

    @hookimpl
    def setup(self, context: SetupContext) -> None:
        super().setup(context)
        self._buffer, self._sft_steps, self._skipped = [], 0, 0

    @hookimpl
    def wrap_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        self._optimizer = optimizer  # only to step it
        return optimizer

    @hookimpl
    def metrics(self, mode: str) -> dict[str, float]:
        counts = {"buffered": len(self._buffer), "sft_steps": self._sft_steps, "skipped_sft_steps": self._skipped}
        return super().metrics(mode) | {name: float(n) for name, n in counts.items()} if mode == "train" else {}

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
