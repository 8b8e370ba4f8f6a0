"""What the methods on an RL and an SFT gradient share: the stream, the progress of the run, and the diagnostics."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from trl_ext import hookimpl
from trl_ext.gradients import GradientView
from trl_ext.records import Rewards, Rollouts, RunDescription, SetupContext, StreamGradient, StreamRequest, WeightsView
from trl_ext_mixing.comparison import Comparison
from trl_ext_mixing.demonstrations import (
    Demonstration,
    Demonstrations,
    first_rows,
    refuse_company,
    refuse_missing_column,
    refuse_split_generations,
    refuse_unsupported,
)
from trl_ext_mixing.rewards import all_groups_equal, pass_rates, refuse_unknown

ROLE = "sft"


@dataclass(eq=False, kw_only=True)
class TwoGradients:
    """Base of the methods that mix GRPO's gradient with that of the stream "sft".

    The stream's loss is the mean negative log-likelihood per label token, or the active objective plugin's loss; the
    GRPO loss keeps its own denominator, so SFT tokens never change the RL gradient.

    Args:
        batch_size: SFT samples per rank and optimiser step; with `demonstrations`, samples per forward. Not with
            `stream_row`, whose rows go through one forward a step.
        demonstrations: column of the GRPO data set; where given, each step takes the demonstrations of the very prompts
            that it rolls out in place of the stream (plain log-likelihood, and not on sharded parameters).
        stream_row: column of the GRPO data set that holds the number (from 0) of the prompt's row in the stream; where
            given, each step takes these rows of the stream, the demonstrations of the very prompts that it rolls out.
        on_exhausted: what to do at the end of the demonstrations: "cycle", "stop" or "error".
        max_length: longest demonstration in tokens; not cut where None.
        reward: name of the reward function that says whether a completion solves its prompt; the weighted sum of all
            where empty. For the logged pass rate.
        solved_at: value of that reward from which a completion counts as solved.
    """

    batch_size: int = 8
    demonstrations: str = ""
    stream_row: str = ""
    on_exhausted: Literal["cycle", "stop", "error"] = "cycle"
    max_length: int | None = None
    reward: str = ""
    solved_at: float = 1.0

    method: ClassVar[str]
    requires_api: ClassVar[str] = "1"
    trainers: ClassVar[tuple[str, ...]] = ("grpo",)
    state_version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"{self.method}: batch_size={self.batch_size} is not a number of samples (1 or more)")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"{self.method}: max_length={self.max_length} leaves no label; give 2 tokens or more")
        if self.stream_row and self.demonstrations:
            raise ValueError(f"{self.method}: stream_row={self.stream_row!r} and demonstrations exclude each other")
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
                f"{self.stream_row!r} would count past them; cut the demonstrations beforehand"
            )
        self._step = 0
        self._max_steps = 1
        self._max_grad_norm = 0.0
        self._source: Demonstrations | None = None
        self._rolled_out: list[Demonstration] = []
        self._rows: list[int] = []
        self._rewards_are_summed = True
        self._template: Mapping[str, Any] = {}
        self._noted: dict[str, float | Tensor] = {}
        self._sums: dict[str, float | Tensor] = {}
        self._counts: dict[str, int] = {}

    @abstractmethod
    def mix(self, gradients: GradientView, sft: StreamGradient, both: Comparison) -> None:
        """Combine the two gradients, in place in `gradients`; called once a step, before TRL's clipping.

        Args:
            gradients: GRPO's gradient, live.
            sft: the stream's.
            both: their norms (a: RL, b: SFT) and cosine.
        """

    # -- hooks -------------------------------------------------------------------------------------------------------

    @hookimpl
    def check(self, run: RunDescription) -> None:
        refuse_company(run, self.method)
        refuse_unknown(run, self.reward)
        self._max_grad_norm = float(run.args.max_grad_norm or 0.0)
        self._rewards_are_summed = run.args.multi_objective_aggregation == "sum_then_normalize"
        self._template = run.args.chat_template_kwargs or {}
        if self.demonstrations:
            refuse_unsupported(run, self.demonstrations, f"{self.method}: demonstrations={self.demonstrations!r}")
        if self.stream_row:
            refuse_missing_column(run, self.stream_row, f"{self.method}: stream_row={self.stream_row!r}")
        if self.demonstrations or self.stream_row:
            refuse_split_generations(run)

    @hookimpl
    def setup(self, context: SetupContext) -> None:
        if self.demonstrations:
            self._source = Demonstrations(context, self.demonstrations, self.max_length, self._template)
        self._step = 0
        self._max_steps = max(context.max_steps, 1)

    @hookimpl
    def streams(self) -> list[StreamRequest]:
        if self.demonstrations:
            return []
        return [
            StreamRequest(
                ROLE,
                batch_size=self.batch_size,
                on_exhausted=self.on_exhausted,
                max_length=self.max_length,
                select=(lambda: self._rows) if self.stream_row else None,
            )
        ]

    @hookimpl
    def advantages(self, rollouts: Rollouts, rewards: Rewards, advantages: Tensor) -> Tensor:
        if rollouts.training:
            self._step = rollouts.step
            rates = pass_rates(rewards, rollouts.num_generations, self.reward, self.solved_at)
            self.note(pass_rate=rates.mean(), solved_prompts=(rates > 0).float().mean())
            if self._source is not None:
                self._rolled_out = list(self._source.of_prompts(rollouts, rewards).values())
            if self.stream_row:
                self._rows = [int(row[self.stream_row]) for _, row in first_rows(rollouts, rewards)]
        return advantages

    @hookimpl
    def gradients_ready(self, gradients: GradientView, streams: Mapping[str, StreamGradient]) -> None:
        sft = streams[ROLE] if self._source is None else self._source.gradient(self._rolled_out, self.batch_size)
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
        self._step = step
        for name, value in self._noted.items():
            if not skipped:  # of such a step most is not finite
                self._sums[name] = self._sums.get(name, 0.0) + value
                self._counts[name] = self._counts.get(name, 0) + 1
        self._noted.clear()

    @hookimpl
    def metrics(self, mode: str) -> dict[str, float]:
        if mode != "train":
            return {}
        return self.read() | ({} if self._source is None else {"dropped_demonstrations": float(self._source.dropped)})

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Optimiser steps done; the stream's position is the core's."""
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the steps done."""
        self._step = int(state["step"])

    # -- for the methods ---------------------------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """Share of the optimiser steps already done, in [0, 1]."""
        return self._step / self._max_steps

    def no_signal(self, rollouts: Rollouts, rewards: Rewards) -> bool:
        """Whether all groups of all ranks have equal rewards: the advantages are then zero but for rounding."""
        return all_groups_equal(rewards, rollouts.num_generations, self._rewards_are_summed)

    def note(self, **values: float | Tensor) -> None:
        """Remember numbers of this step for the log, where the means since the last log appear.

        Tensors stay on their device until then. A step that is skipped does not count.
        """
        self._noted.update(values)

    def read(self) -> dict[str, float]:
        """Means of what was noted since the last reading."""
        values = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums.clear()
        self._counts.clear()
        return values
