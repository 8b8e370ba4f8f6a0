"""What the methods on an RL and an SFT gradient share: the demonstrations, the steps done, and the diagnostics."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from trl_ext import hookimpl
from trl_ext.gradients import GradientView
from trl_ext.hookspecs import HOOKS
from trl_ext.options import Range
from trl_ext.records import Rewards, Rollouts, RunDescription, SetupContext, StreamGradient, StreamRequest, WeightsView
from trl_ext_mixing.company import MIXING, ONE_AT_A_TIME
from trl_ext_mixing.comparison import Comparison
from trl_ext_mixing.means import Means
from trl_ext_mixing.pass_rates import all_groups_equal, pass_rates, summary
from trl_ext_mixing.run_checks import refuse_unknown_reward
from trl_ext_mixing.sft_sources import DemonstrationColumn, SFTStream, SFTStreamRows


@dataclass(eq=False, kw_only=True)
class TwoGradients:
    """Base of the methods that mix the gradient of the trainer's own loss with that of the stream "sft".

    The stream's loss is the mean negative log-likelihood per label token, or the active objective plugin's loss; the
    trainer's loss keeps its own denominator, so SFT tokens never change its gradient. That loss is GRPO's or RLOO's,
    whose papers the methods come from, or DPO's, KTO's or distillation's: "RL" below and in the log stands for it.

    Args:
        batch_size: SFT samples per rank and optimiser step; with `demonstrations`, samples per forward. Not with
            `stream_row`, whose rows go through one forward a step.
        demonstrations: column of the prompts' data set; where given, each step takes the demonstrations of the very
            prompts that it rolls out in place of the stream (plain log-likelihood, and not on sharded parameters).
        stream_row: column of the prompts' data set that holds the number (from 0) of the prompt's row in the stream;
            where given, each step takes these rows of the stream, the demonstrations of the prompts that it rolls out.
        on_exhausted: what to do at the end of the demonstrations: "cycle", "stop" or "error".
        max_length: longest demonstration in tokens; not cut where None.
        reward: name of the reward function that says whether a completion solves its prompt; the weighted sum of all
            where empty. For the logged pass rate, which is over the completions that it judges.
        solved_at: value of that reward from which a completion counts as solved.

    Raises:
        ValueError: options that exclude each other.
    """

    batch_size: Annotated[int, Range(ge=1)] = 8
    demonstrations: str = ""
    stream_row: str = ""
    on_exhausted: Literal["cycle", "stop", "error"] = "cycle"
    max_length: Annotated[int, Range(ge=2)] | None = None
    reward: str = ""
    solved_at: float = 1.0

    method: ClassVar[str]
    requires_api: ClassVar[str] = ">=1.5,<2"
    cost: ClassVar[str] = "a forward and a backward of the demonstrations"
    trainers: ClassVar[tuple[str, ...]] = ("grpo", "rloo", "dpo", "kto", "distillation")
    of_rewards: ClassVar[tuple[str, ...]] = ("demonstrations", "stream_row", "reward", "solved_at")
    """Options that mean something only where the trainer rewards completions."""
    provides: ClassVar[tuple[str, ...]] = (MIXING,)
    conflicts: ClassVar[Mapping[str, str]] = ONE_AT_A_TIME
    state_version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        self._refuse_contradictions()
        self._source = self._sft_source()
        self.step = 0
        self.max_steps = 1
        self.trainers_max_norm = 0.0
        self._rewards_are_summed = True
        self._rewards_are_all = True
        self._noted: dict[str, float | Tensor] = {}
        self._means = Means()

    @abstractmethod
    def mix(self, gradients: GradientView, sft: StreamGradient, both: Comparison) -> None:
        """Combine the two gradients, in place in `gradients`; called once a step, before TRL's clipping.

        Args:
            gradients: that of the trainer's loss, live.
            sft: the stream's.
            both: their norms (a: RL, b: SFT) and cosine.
        """

    # -- hooks -------------------------------------------------------------------------------------------------------

    @hookimpl
    def check(self, run: RunDescription) -> None:
        if run.trainer not in HOOKS["advantages"].trainers:
            self._refuse_options_of_rewards(run)
        refuse_unknown_reward(run, self.reward)
        self.trainers_max_norm = float(run.args.max_grad_norm or 0.0)
        if run.trainer == "grpo":
            self._rewards_are_summed = run.args.multi_objective_aggregation == "sum_then_normalize"
        self._rewards_are_all = run.trainer != "rloo" or not run.args.beta  # RLOO's KL term is part of its rewards
        self._source.check(run)

    @hookimpl
    def setup(self, context: SetupContext) -> None:
        self._source.setup(context)
        self.step = 0
        self.max_steps = max(context.max_steps, 1)

    @hookimpl
    def streams(self) -> list[StreamRequest]:
        return self._source.requests()

    @hookimpl
    def advantages(self, rollouts: Rollouts, rewards: Rewards, advantages: Tensor) -> Tensor:
        if rollouts.training:
            self.step = rollouts.step
            self.note(**summary(pass_rates(rewards, rollouts.num_generations, self.reward, self.solved_at)))
            self._source.rolled_out(rollouts, rewards)
        return advantages

    @hookimpl
    def gradients_ready(self, gradients: GradientView, streams: Mapping[str, StreamGradient]) -> None:
        sft = self._source.gradient(streams)
        both = Comparison.of_gradients(gradients.parameters, gradients.tensors, sft.gradients.tensors)
        self.note(
            sft_nll=sft.nll,
            sft_loss=sft.loss,
            grad_norm_rl=both.norm_a,
            grad_norm_sft=both.norm_b,
            grad_cosine=both.cosine,
            grad_sign_conflicts=both.sign_conflicts,
        )
        self.mix(gradients, sft, both)
        if not torch.isfinite(both.norm_b):
            gradients.mul_(torch.nan)  # the core looks at these gradients, and decides on all ranks alike

    @hookimpl
    def weights_updated(self, weights: WeightsView, step: int, skipped: bool) -> None:
        self.step = step
        if not skipped:  # of such a step most is not finite
            self._means.add(**self._noted)
        self._noted.clear()

    @hookimpl
    def metrics(self, mode: str) -> dict[str, float]:
        return self._means.read() | self._source.metrics() if mode == "train" else {}

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Optimiser steps done; the stream's position is the core's."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the steps done."""
        self.step = int(state["step"])

    # -- for the methods ---------------------------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """Share of the optimiser steps already done, in [0, 1]."""
        return self.step / self.max_steps

    def no_signal(self, rollouts: Rollouts, rewards: Rewards) -> bool:
        """Whether all groups of all ranks have equal rewards: the advantages are then zero but for rounding."""
        return self._rewards_are_all and all_groups_equal(rewards, rollouts.num_generations, self._rewards_are_summed)

    def note(self, **values: float | Tensor) -> None:
        """Remember numbers of this step for the log, where the means since the last log appear.

        Tensors stay on their device until then. A step that is skipped does not count.
        """
        self._noted.update(values)

    # -- options -----------------------------------------------------------------------------------------------------

    def _sft_source(self) -> SFTStream:
        common: dict[str, Any] = {
            "batch_size": self.batch_size,
            "on_exhausted": self.on_exhausted,
            "max_length": self.max_length,
        }
        if column := self.demonstrations:
            return DemonstrationColumn(column=column, setting=f"{self.method}: demonstrations={column!r}", **common)
        if column := self.stream_row:
            return SFTStreamRows(column=column, setting=f"{self.method}: stream_row={column!r}", **common)
        return SFTStream(**common)

    def _refuse_options_of_rewards(self, run: RunDescription) -> None:
        for name in self.of_rewards:
            value = getattr(self, name)
            if value != getattr(type(self), name):
                raise ValueError(
                    f"{self.method}: {name}={value!r} is about completions that are rewarded, and the trainer "
                    f"{run.trainer} rewards none; leave it out"
                )

    def _refuse_contradictions(self) -> None:
        if self.stream_row and self.demonstrations:
            raise ValueError(
                f"{self.method}: stream_row={self.stream_row!r} and demonstrations={self.demonstrations!r} exclude "
                "each other; leave one out"
            )
        if self.stream_row and self.batch_size != TwoGradients.batch_size:
            raise ValueError(
                f"{self.method}: stream_row={self.stream_row!r} takes the rows of a step's prompts in one forward, and "
                f"batch_size={self.batch_size} would do nothing; leave it out"
            )
        if (self.stream_row or self.demonstrations) and self.on_exhausted != "cycle":
            raise ValueError(
                f"{self.method}: on_exhausted={self.on_exhausted!r} does nothing where the demonstrations are those of "
                "the step's prompts; leave it out"
            )
        if self.stream_row and self.max_length is not None:
            raise ValueError(
                f"{self.method}: max_length={self.max_length} may drop rows of the stream, and stream_row="
                f"{self.stream_row!r} would count past them; leave it out and cut the demonstrations beforehand"
            )
