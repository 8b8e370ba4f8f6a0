"""What the options of `data-regularization` come to: the record that everything below the plugin is made from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from trl_ext.records import StreamRequest
from trl_ext_data_regularization.solvers import Rule


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The options as they were given (`DataRegularization` says what they mean), and what follows from them."""

    scope: str
    rule: str
    frac: float | None
    general: str
    stream_batch_size: int | None
    stream_max_length: int | None
    with_target: bool
    engine: str
    unit: str
    passes: str
    points: int
    sketch_size: int
    radius: float
    precondition: bool
    seed: int
    position_steps: int
    table: bool
    report_steps: int

    @cached_property
    def solver(self) -> Rule:
        """The rule with its settings; the share of samples is the paper's where none was given."""
        frac = self.frac if self.frac is not None else 1.0 if self.rule == "filter" else 0.5
        return Rule(self.rule, frac, self.radius)

    @property
    def scored_by(self) -> str:
        """The engine in use, where the choice was left open: the cheapest that gives what the rule needs."""
        return self.engine if self.engine != "auto" else "direct" if self.solver.needs_gram else "ghost"

    @property
    def layerwise(self) -> bool:
        """Whether each layer chooses for itself."""
        return self.scope == "layer"

    @property
    def per_micro_batch(self) -> bool:
        """Whether each micro-batch of each rank chooses for itself."""
        return self.unit == "micro"

    @property
    def from_stream(self) -> bool:
        """Whether general samples come from a stream, and the trainer's own data are the target."""
        return self.general == "stream"

    @property
    def keeps_target(self) -> bool:
        """Whether the target's gradient is needed once it has been sketched."""
        in_update = self.with_target or self.solver.uses_target
        return self.scored_by != "sketch" or in_update or self.position_steps > 0

    @property
    def stream(self) -> StreamRequest:
        """The second data set: the target, before the window, or the general one, after it."""
        if self.from_stream:
            return StreamRequest("general", self.stream_batch_size or 8, "after", max_length=self.stream_max_length)
        size = self.stream_batch_size or 1
        return StreamRequest("target", size, "before", max_length=self.stream_max_length, keep=self.keeps_target)
