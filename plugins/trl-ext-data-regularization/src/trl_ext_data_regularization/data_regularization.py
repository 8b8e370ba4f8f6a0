"""`data-regularization`: at each step of SFT, project the target's gradient onto what the general data allow.

    u = sum_i w_i g_i + a t,    w = rule(s, K),    s_i = <g_i, t>,    K_ij = <g_i, g_j>      (arXiv:2605.07063)

u replaces the mean general gradient. g_i is the gradient of general sample i's *share* of the token-mean loss, so that
w = 1 is plain training, and a subset S at w_i = T_tot / (label tokens of S) is the token-mean loss on S alone. t is the
gradient of the target's token-mean loss. All of them are taken in each layer, or over all layers together. The rules
are in `solvers`, the ways to s and K in `engines`, one file each.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from trl_ext import hookimpl
from trl_ext.gradients import GradientView
from trl_ext.options import Range
from trl_ext.ranks import on_every_rank
from trl_ext.records import SampleWeights
from trl_ext_data_regularization.checks import refuse_contradictions, refuse_run
from trl_ext_data_regularization.engines import Projections, Scores, Target, make_engine
from trl_ext_data_regularization.observer import Observer, summary
from trl_ext_data_regularization.plan import Plan
from trl_ext_data_regularization.preconditioner import preconditioned, refuse_without_second_moments
from trl_ext_data_regularization.ranks import in_two_parts
from trl_ext_data_regularization.relations import COMBINED_TWICE, COMBINES_TARGET
from trl_ext_data_regularization.selection import Samples, samples_of, samples_of_inputs
from trl_ext_data_regularization.tapped_model import Inputs, TappedModel
from trl_ext_data_regularization.visitors import WeightedPass
from trl_ext_data_regularization.window_choice import WindowChoice

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trl_ext.records import RunDescription, SetupContext, StreamGradient, StreamRequest, Window
    from trl_ext_data_regularization.diagnostics import Recorder

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class DataRegularization:
    """Train on those parts of the general data that agree with a small, trusted target set.

    Each step, u = sum_i w_i g_i (+ a t) replaces the mean general gradient; the rule chooses w from <g_i, t> and, where
    it needs them, <g_i, g_j>. Inner products are raw unless `precondition`.

    Args:
        scope: "layer": every Linear, Embedding and norm chooses for itself; "global": one choice for all of them.
        rule: how weights follow from scores; span, cone, hull, capped and ball are extensions, not in the paper.
        frac: topk, second-order, capped: share of the samples to keep; filter: share of the negative ones to drop. None
            is the paper's: 0.5, and 1.0 for filter.
        general: which data are general and which are target. "train": the trainer's own data are general, the stream
            "target" is the target. "stream": the trainer's own data are the target, the stream "general" is general.
        stream_batch_size: samples per rank and step of the stream; None is 1 target sample, or 8 general ones.
        stream_max_length: longest sample of the stream in tokens; the trainer's `max_length` where None.
        with_target: add the target's own gradient to the update.
        engine: how scores are had. "ghost": no sample's gradient is formed; "direct": all of them are; "sketch": random
            projections; "derivative": forward passes at perturbed weights (global scope). "auto": ghost, or direct for
            rules that need <g_i, g_j>.
        unit: what one choice is made over: "step" is the accumulation window over all ranks, "micro" each micro-batch.
        passes: "one" chooses in the middle of the backward pass, "two" scores first. "auto" is one where it is exact.
        points: derivative: forward passes of the window, 2 or 4; 2 leave the third derivative in the scores.
        sketch_size: the projections' width per side.
        radius: ball: its radius relative to the mean general gradient.
        precondition: scores are <g_i, P t>, with the target's gradient as Adam would scale it (topk and filter).
        seed: of the projections.
        position_steps: every so many steps, take the mean general gradient itself (one more forward and backward of
            the window) for the metrics `cosine` and `position`. 0: they come free with direct and sketch, and not at
            all with ghost and derivative.
        table: count how often each sample is kept (the first 100,000), and write it, with the share kept by layer, to
            the output folder after the last step of the run as planned (`trl_ext_data_regularization.kept_report`).
        report_steps: write every so many steps, too; a run that is stopped early leaves the last of these.

    Raises:
        ValueError: two options contradict each other, or one would have no effect.
    """

    scope: Literal["layer", "global"] = "layer"
    rule: Literal["full", "target", "topk", "filter", "second-order", "span", "cone", "hull", "capped", "ball"] = "topk"
    frac: Annotated[float, Range(ge=0, le=1)] | None = None
    general: Literal["train", "stream"] = "train"
    stream_batch_size: Annotated[int, Range(ge=1)] | None = None
    stream_max_length: Annotated[int, Range(ge=1)] | None = None
    with_target: bool = False
    engine: Literal["auto", "ghost", "direct", "sketch", "derivative"] = "auto"
    unit: Literal["step", "micro"] = "step"
    passes: Literal["auto", "one", "two"] = "auto"
    points: Literal[2, 4] = 2
    sketch_size: Annotated[int, Range(ge=1)] = 64
    radius: Annotated[float, Range(ge=0)] = 1.0
    precondition: bool = False
    seed: int = 0
    position_steps: Annotated[int, Range(ge=0)] = 0
    table: bool = False
    report_steps: Annotated[int, Range(ge=0)] = 0

    requires_api: ClassVar[str] = ">=1.5,<2"
    trainers: ClassVar[tuple[str, ...]] = ("sft",)
    provides: ClassVar[tuple[str, ...]] = (COMBINES_TARGET,)
    conflicts: ClassVar[Mapping[str, str]] = {COMBINES_TARGET: COMBINED_TWICE}
    citation: ClassVar[str] = "Hu, Liu, Mao and Ma, Dr. Post-Training, arXiv:2605.07063"
    cost: ClassVar[str] = "a forward and a backward of the target batch; 1.2 to 2.2 times plain training, by engine"

    def __post_init__(self) -> None:
        self._plan = Plan(**{option.name: getattr(self, option.name) for option in fields(Plan)})
        refuse_contradictions(self._plan)
        self._model: TappedModel | None = None
        self._optimizer: torch.optim.Optimizer | None = None

    # -- start-up ----------------------------------------------------------------------------------------------------

    @hookimpl
    def check(self, run: RunDescription) -> None:
        refuse_run(self._plan, run)

    @hookimpl
    def streams(self) -> list[StreamRequest]:
        return [self._plan.stream]

    @hookimpl
    def wrap_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        if self.precondition:
            refuse_without_second_moments(optimizer)
        self._optimizer = optimizer  # only read: its learning rate and second moments
        return optimizer

    @hookimpl
    def setup(self, context: SetupContext) -> None:
        if self._model is not None:
            self._model.remove()
        self._context, plan = context, self._plan
        self._model = model = TappedModel(plan, context)
        self._projections = Projections(plan.sketch_size, plan.seed)
        self._observer = Observer(plan, context, model.layers if plan.layerwise else ())
        self._choice: WindowChoice | None = None
        self._steps_done = 0
        self.state_per_rank = self.table and context.world_size > 1
        if context.rank == 0:
            print(f"data-regularization: {summary(plan, model.layers, model.one_pass)}")

    # -- one step: the weights ---------------------------------------------------------------------------------------

    @hookimpl
    def sample_weights(self, window: Window) -> SampleWeights | None:
        """(n,) weights for the loss in global scope, over all label tokens; a layer's are applied in its backward."""
        assert self._model is not None
        self._model.rest()
        self._choice, self._steps_done = None, window.step
        if self._model.own is not None:
            self._model.own.begin()
            self._model.expect(samples_of(window).batches, afterwards=self._begin_general)
            return None
        return self._weigh(window, self._model)

    def _weigh(self, window: Window, model: TappedModel) -> SampleWeights | None:
        def begun() -> WindowChoice:
            return self._begin_step(samples_of(window), list(window.streams["target"].gradients.tensors))

        def scored(choice: WindowChoice) -> tuple[WindowChoice, Scores | None]:
            choice.settle_target()
            return choice, None if model.one_pass else choice.score(window, model.taps, self._context)

        choice, scores = in_two_parts(begun, scored, collective=self._context.sharded)
        self._observer.window(window)
        if scores is not None:
            choice.choose(scores)
        self._choice = choice
        if not self._plan.layerwise:
            model.expect(choice.samples.batches)
            return SampleWeights(choice.weights[0], "tokens")
        model.expect(choice.samples.batches, choice.visitor() if model.one_pass else WeightedPass(choice.choice))
        return None

    def _begin_general(self, inputs: Inputs) -> None:
        """The forward that begins is the general stream's, whose backward chooses; the trainer's own data are t."""
        assert self._model is not None
        assert self._model.own is not None
        batch, tokens = samples_of_inputs(inputs)
        self._choice = self._begin_step(Samples((batch,), tokens), self._model.own.take())
        self._choice.settle_target()
        self._model.taps.visitor, self._model.taps.batch = self._choice.visitor(), batch
        self._observer.general([inputs])

    def _begin_step(self, samples: Samples, gradients: list[Tensor | None]) -> WindowChoice:
        """Without a collective; `gradients` are the target's."""
        assert self._optimizer is not None
        assert self._model is not None
        parameters = self._context.weights.parameters
        if self.precondition:
            gradients = preconditioned(self._optimizer, parameters, gradients)
        layers, device, target = self._model.layers, self._context.device, Target(gradients, parameters)
        return WindowChoice(
            plan=self._plan,
            lr=float(self._optimizer.param_groups[0]["lr"]),
            layers=layers,
            samples=samples,
            target=target,
            engine=make_engine(self._plan.scored_by, layers, target, len(samples), device, self._projections),
        )

    # -- one step: the update ----------------------------------------------------------------------------------------

    @hookimpl
    def gradients_ready(self, gradients: GradientView, streams: Mapping[str, StreamGradient]) -> None:
        """`gradients` becomes u: sum_i w_i g_i is there, by weighted backward passes, and a t is added."""
        assert self._model is not None
        self._model.rest()
        choice, self._choice = self._choice, None
        if choice is None:
            return
        share = self._target_share(choice)
        update: GradientView = gradients
        target: GradientView | None = None
        if self._plan.from_stream:
            update, target = streams["general"].gradients, gradients
        elif self._plan.keeps_target:
            target = streams["target"].gradients
        if target is not None and share is not None:
            update = update.clone() if self._plan.from_stream else update
            self._add_target(update, target, share)
        self._warn_where_nothing_was_chosen(choice)
        self._observer.step(self._steps_done + 1, choice, update, target)
        if self._plan.from_stream:
            gradients.copy_(update)

    def _target_share(self, choice: WindowChoice) -> Tensor | float | None:
        """a: 1 with `with_target`, (L,) float where the rule gives it, which is collective; None for 0.

        Raises:
            Exception: what went wrong in this rank's backward pass.
            OnAllRanksError: the same on several ranks, where the exchange would wait for the one that failed.
        """
        if not self._plan.solver.uses_target:
            choice.raise_failure()
            return 1.0 if self.with_target else None
        on_every_rank(choice.raise_failure)
        return choice.target_share()

    def _add_target(self, update: GradientView, target: GradientView, share: Tensor | float) -> None:
        """Add a t, with one `a` for all parameters or one by layer."""
        assert self._model is not None
        if isinstance(share, float) or not self._plan.layerwise:
            update.axpy_(share if isinstance(share, float) else share[0], target)
            return
        by_parameter = {i: share[row] for row, layer in enumerate(self._model.layers) for i in layer.parameters}
        scaled = [None if t is None else t * by_parameter[i].to(t.dtype) for i, t in enumerate(target.tensors)]
        update.axpy_(1.0, GradientView(target.names, target.parameters, scaled))

    def _warn_where_nothing_was_chosen(self, choice: WindowChoice) -> None:
        """NaN scores give NaN weights and a NaN update, which `nonfinite` decides on; say where they come from."""
        if layers := choice.not_finite:
            logger.warning(
                "data-regularization: at step %d the scores <g_i, t> are NaN or infinite in %s (%d of %d): the "
                "target's gradient or a general sample's is not finite, no sample can be chosen, and the update is NaN",
                *(self._steps_done + 1, layers[0], len(layers), len(choice.weights)),
            )

    # -- diagnostics -------------------------------------------------------------------------------------------------

    @property
    def recorder(self) -> Recorder:
        """The diagnostics of the training under way, or of the last one."""
        return self._observer.recorder

    @hookimpl
    def metrics(self, mode: str) -> dict[str, float]:
        return self.recorder.metrics() if mode == "train" else {}

    def state_dict(self) -> dict[str, Any]:
        """What has been counted so far; the training does not depend on it."""
        return self._observer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self._observer.load_state_dict(state)
