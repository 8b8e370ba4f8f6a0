"""Where a step's SFT gradient comes from: the stream "sft", chosen rows of it, or a column of the GRPO data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trl_ext.records import Rewards, Rollouts, RunDescription, SetupContext, StreamGradient, StreamRequest
from trl_ext_mixing.demonstrations import Demonstration, Demonstrations, group_starts
from trl_ext_mixing.run_checks import refuse_missing_column, refuse_split_generations, refuse_without_own_forward

ROLE = "sft"


@dataclass(kw_only=True)
class SFTStream:
    """The stream's samples in the core's seeded order; `batch_size` of them per rank and step."""

    batch_size: int
    on_exhausted: Literal["cycle", "stop", "error"]
    max_length: int | None

    def check(self, run: RunDescription) -> None:
        """Refuse a run in which this source cannot work."""

    def setup(self, context: SetupContext) -> None:
        """Take what is needed of the run."""

    def requests(self) -> list[StreamRequest]:
        """Streams that the core has to provide."""
        return [
            StreamRequest(ROLE, batch_size=self.batch_size, on_exhausted=self.on_exhausted, max_length=self.max_length)
        ]

    def rolled_out(self, rollouts: Rollouts, rewards: Rewards) -> None:
        """Take notice of a step's prompts. Collective."""

    def gradient(self, streams: Mapping[str, StreamGradient]) -> StreamGradient:
        """The gradient of the mean SFT loss per label token over all ranks. Collective."""
        return streams[ROLE]

    def metrics(self) -> dict[str, float]:
        """Numbers for the log."""
        return {}


@dataclass(kw_only=True)
class SFTStreamRows(SFTStream):
    """The stream's rows whose numbers stand in a column of the GRPO data, those of the step's own prompts."""

    column: str
    setting: str
    rows: list[int] = field(default_factory=list)

    def check(self, run: RunDescription) -> None:
        refuse_missing_column(run, self.column, self.setting)
        refuse_split_generations(run)

    def requests(self) -> list[StreamRequest]:
        return [StreamRequest(ROLE, select=lambda: self.rows)]

    def rolled_out(self, rollouts: Rollouts, rewards: Rewards) -> None:
        self.rows = [int(rollouts.inputs[i][self.column]) for _, i in group_starts(rollouts, rewards)]


@dataclass(kw_only=True)
class DemonstrationColumn(SFTStream):
    """Demonstrations of the step's own prompts from a column of the GRPO data: plain log-likelihood, no stream."""

    column: str
    setting: str

    def __post_init__(self) -> None:
        self._rolled_out: list[Demonstration] = []
        self._template: Mapping[str, Any] = {}
        self._demonstrations: Demonstrations

    def check(self, run: RunDescription) -> None:
        as_stream = ", or give the demonstrations as the stream 'sft' and the numbers of its rows by stream_row"
        refuse_without_own_forward(run, self.setting, as_stream)
        refuse_missing_column(run, self.column, self.setting)
        refuse_split_generations(run)
        self._template = run.args.chat_template_kwargs or {}

    def setup(self, context: SetupContext) -> None:
        self._demonstrations = Demonstrations(context, self.column, self.max_length, self._template)

    def requests(self) -> list[StreamRequest]:
        return []

    def rolled_out(self, rollouts: Rollouts, rewards: Rewards) -> None:
        self._rolled_out = list(self._demonstrations.of_prompts(rollouts, rewards).values())

    def gradient(self, streams: Mapping[str, StreamGradient]) -> StreamGradient:
        return self._demonstrations.gradient(self._rolled_out, self.batch_size)

    def metrics(self) -> dict[str, float]:
        return {"dropped_demonstrations": float(self._demonstrations.dropped)}
