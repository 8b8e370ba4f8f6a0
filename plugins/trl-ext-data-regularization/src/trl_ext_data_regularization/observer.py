"""When diagnostics are taken and written, and where they are kept between runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from trl_ext.gradients import GradientView
from trl_ext.records import SetupContext, Window
from trl_ext_data_regularization import kept_report
from trl_ext_data_regularization.diagnostics import Recorder, token_lists, view_terms
from trl_ext_data_regularization.layers import Layer, type_of
from trl_ext_data_regularization.plan import Plan
from trl_ext_data_regularization.window_choice import WindowChoice


class Observer:
    """Watches the steps of one training.

    Args:
        plan: says what is wanted.
        context: the run.
        layers: what chooses for itself; empty in global scope.
    """

    def __init__(self, plan: Plan, context: SetupContext, layers: Sequence[Layer]) -> None:
        self.plan = plan
        self.context = context
        names, types = [layer.name for layer in layers], [layer.type for layer in layers]
        self.recorder = Recorder(names or ["all"], types or ["all"], keep=plan.table)
        self._types = [type_of(name.rpartition(".")[0]) for name in context.names]
        self._batches: Sequence[Mapping[str, Tensor]] | None = None
        self._general: GradientView | None = None

    def window(self, window: Window) -> None:
        """Before a window's choice. Collective in steps whose position is asked for."""
        self._general = None
        if self.plan.position_steps and window.step % self.plan.position_steps == 0:
            first, *more = [window.gradient(i, None) for i in range(len(window.micro_batches))]
            for gradient in more:
                first.axpy_(1.0, gradient)
            self._general = first
        self.general(window.micro_batches)

    def general(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Take note of the general samples of a step."""
        self._batches = batches if self.plan.table else None

    def step(self, number: int, choice: WindowChoice, update: GradientView, target: GradientView | None) -> None:
        """After a choice. Collective under FSDP2.

        Args:
            number: of the optimiser step, from 1.
            choice: the choice.
            update: u.
            target: t; None where it was dropped once it had been sketched.
        """
        recorder = self.recorder
        recorder.record(number, choice.weights)
        recorder.add("agreeing", choice.agreeing())
        if target is not None:
            recorder.add("update_cosine", update.cosine(target))
        if self._general is not None and target is not None:
            recorder.geometry(self._types, view_terms(update, target, self._general))
            self._general = None
        elif not self.plan.position_steps and not self.plan.precondition:
            terms = choice.geometry()
            if terms is not None:
                recorder.geometry(recorder.types, terms)
        if self._batches is not None:
            ids = token_lists(self._batches, [batch.index for batch in choice.samples.batches])
            recorder.note_samples(ids, choice.weights)
        due = self.plan.report_steps and number % self.plan.report_steps == 0
        if self.plan.table and (due or number == self.context.max_steps):
            samples = kept_report.samples_of(recorder, self.context.tokenizer)
            kept_report.write(self.context.output_dir, self.context.rank, kept_report.kept_of(recorder), samples)

    def state_dict(self) -> dict[str, Any]:
        """What the table and the plot are made of; nothing without `table`."""
        return self.recorder.state_dict() if self.plan.table else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the table and the plot of the run that wrote the checkpoint."""
        if self.plan.table and state:
            self.recorder.load_state_dict(state)


def summary(plan: Plan, layers: Sequence[Layer], one_pass: bool) -> str:
    """What was decided for a run, and which metrics that gives."""
    engine = plan.scored_by
    passes = "one pass" if one_pass else "two passes"
    where = f"{len(layers)} layers" if plan.layerwise else "all layers together"
    if plan.position_steps:
        angles = f"cosine and position exactly, every {plan.position_steps} steps"
    elif engine in ("direct", "sketch") and not plan.per_micro_batch and not plan.precondition:
        angles = f"cosine and position by engine={engine}, where it sees all samples of a step"
    else:
        angles = "no cosine and position (position_steps=N gives them)"
    metrics = "kept, agreeing"
    if plan.keeps_target or plan.from_stream:
        metrics += ", update_cosine"
    return f"engine {engine} over {where}, {passes}; metrics {metrics}; {angles}"
