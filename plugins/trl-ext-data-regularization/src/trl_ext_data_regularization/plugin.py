"""`data-regularization`: in SFT, project the target's gradient onto what general data allows, globally or per layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from trl_ext import hookimpl
from trl_ext.gradients import GradientView
from trl_ext.records import RunDescription, SampleWeights, SetupContext, StreamGradient, StreamRequest, Window
from trl_ext_data_regularization.checks import one_pass, refuse, validate
from trl_ext_data_regularization.diagnostics import Recorder
from trl_ext_data_regularization.engines import Direct, Engine, Ghost, Projections, Scores, Sketch
from trl_ext_data_regularization.layers import Batch, Layer, Use, find_layers
from trl_ext_data_regularization.observer import Observer, summary
from trl_ext_data_regularization.preconditioner import preconditioned, refuse_without_second_moments
from trl_ext_data_regularization.ranks import FailedElsewhere, together
from trl_ext_data_regularization.selection import Samples, samples_of, samples_of_inputs
from trl_ext_data_regularization.solvers import Rule
from trl_ext_data_regularization.step import Step
from trl_ext_data_regularization.taps import Taps
from trl_ext_data_regularization.visitors import WeightedPass


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
            the output folder after the last step of the run as planned (`trl_ext_data_regularization.report`).
        report_steps: write every so many steps, too; a run that is stopped early leaves the last of these.
    """

    scope: Literal["layer", "global"] = "layer"
    rule: Literal["full", "target", "topk", "filter", "second-order", "span", "cone", "hull", "capped", "ball"] = "topk"
    frac: float | None = None
    general: Literal["train", "stream"] = "train"
    stream_batch_size: int | None = None
    stream_max_length: int | None = None
    with_target: bool = False
    engine: Literal["auto", "ghost", "direct", "sketch", "derivative"] = "auto"
    unit: Literal["step", "micro"] = "step"
    passes: Literal["auto", "one", "two"] = "auto"
    points: Literal[2, 4] = 2
    sketch_size: int = 64
    radius: float = 1.0
    precondition: bool = False
    seed: int = 0
    position_steps: int = 0
    table: bool = False
    report_steps: int = 0

    requires_api: ClassVar[str] = ">=1.1,<2"  # StreamRequest.keep
    trainers: ClassVar[tuple[str, ...]] = ("sft",)
    citation: ClassVar[str] = "Hu, Liu, Mao and Ma, Dr. Post-Training, arXiv:2605.07063"

    def __post_init__(self) -> None:
        frac = self.frac if self.frac is not None else 1.0 if self.rule == "filter" else 0.5
        self._rule = Rule(self.rule, frac, self.radius)
        self._engine = self.engine if self.engine != "auto" else "direct" if self._rule.needs_gram else "ghost"
        validate(self, self._rule, self._engine)
        self._taps: Taps | None = None
        self._handles: list[Any] = []
        self._optimizer: torch.optim.Optimizer | None = None

    # -- start-up ----------------------------------------------------------------------------------------------------

    @hookimpl
    def check(self, run: RunDescription) -> None:
        refuse(self, self._rule, self._engine, run)

    @hookimpl
    def streams(self) -> list[StreamRequest]:
        if self.general == "train":
            size, longest, keep = self.stream_batch_size or 1, self.stream_max_length, self.keeps_target
            return [StreamRequest("target", size, "before", max_length=longest, keep=keep)]
        return [StreamRequest("general", self.stream_batch_size or 8, "after", max_length=self.stream_max_length)]

    @hookimpl
    def wrap_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        if self.precondition:
            refuse_without_second_moments(optimizer)
        self._optimizer = optimizer  # only read: its learning rate and second moments
        return optimizer

    @hookimpl
    def setup(self, context: SetupContext) -> None:
        self._remove()
        self._context = context
        self._layers: list[Layer] = []
        uses: list[Use] = []
        if self._engine != "derivative":
            self._layers, uses = find_layers(context.model, context.names)
        elif any(p.dtype not in (torch.float32, torch.float64) for p in context.weights.parameters):
            raise ValueError("engine=derivative needs weights in fp32; load the model in fp32, or use engine=ghost")
        self._one_pass = one_pass(self, self._layers, context)
        self._projections = Projections(self.sketch_size, self.seed)
        # Registered before the taps' own hooks, which ask whether the pass that begins is to be tapped.
        self._handles = [context.model.register_forward_pre_hook(self._begin_forward, with_kwargs=True)]
        self._taps = Taps(context.model, uses)
        self._observer = Observer(self, context, self._layers if self.scope == "layer" else ())
        self.state_per_rank = self.table and context.world_size > 1
        self._step: Step | None = None
        self._steps_done = 0
        self._waiting: list[Batch] = []
        self._own_gradients: dict[int, Tensor] = {}
        if self.general == "stream":
            self._keep_own_gradients()
        if context.rank == 0:
            print(f"data-regularization: {summary(self, self._engine, self._layers, self._one_pass)}")

    @property
    def recorder(self) -> Recorder:
        """The diagnostics of the training under way, or of the last one."""
        return self._observer.recorder

    @property
    def keeps_target(self) -> bool:
        """Whether the target's gradient is needed once it has been sketched."""
        in_update = self.with_target or self._rule.name in ("target", "ball")
        return self._engine != "sketch" or in_update or self.position_steps > 0

    def _remove(self) -> None:
        """Undo an earlier `setup`: a second `train()` calls it again."""
        if self._taps is not None:
            self._taps.remove()
        for handle in self._handles:
            handle.remove()

    # -- one step ----------------------------------------------------------------------------------------------------

    @hookimpl
    def sample_weights(self, window: Window) -> SampleWeights | None:
        try:
            return self._weigh(window)
        except FailedElsewhere:
            return None

    def _weigh(self, window: Window) -> SampleWeights | None:
        assert self._taps is not None
        taps, device = self._taps, self._context.device
        taps.visitor, self._step, self._waiting = None, None, []
        self._steps_done = window.step
        if self.general == "stream":
            self._own_gradients.clear()
            self._waiting = list(samples_of(window).batches)
            return None

        def local() -> tuple[Step, Scores | None]:
            step = self._begin_step(samples_of(window), list(window.streams["target"].gradients.tensors))
            if not self.keeps_target:
                step.forget_target()
            return step, None if self._one_pass else step.score(window, taps, self._context)

        step, scores = together(local, device)
        self._observer.window(window)
        if scores is not None:
            step.choose(scores)
        self._step, self._waiting = step, list(step.samples.batches)
        if self.scope == "global":
            return SampleWeights(step.weights[0], "tokens")
        taps.visitor = step.visitor() if self._one_pass else WeightedPass(step.choice)
        return None

    def _begin_step(self, samples: Samples, target: list[Tensor | None]) -> Step:
        assert self._optimizer is not None
        if self.precondition:
            target = preconditioned(self._optimizer, self._context.weights.parameters, target)
        return Step(
            rule=self._rule,
            lr=float(self._optimizer.param_groups[0]["lr"]),
            layerwise=self.scope == "layer",
            per_micro_batch=self.unit == "micro",
            points=self.points,
            layers=self._layers,
            samples=samples,
            target=target,
            engine=self._make_engine(target, len(samples)),
        )

    def _make_engine(self, target: list[Tensor | None], samples: int) -> Engine | None:
        device = self._context.device
        match self._engine:
            case "ghost":
                return Ghost(self._layers, target, samples, device)
            case "direct":
                return Direct(self._layers, target, samples, device)
            case "sketch":
                return Sketch(self._layers, target, samples, device, self._projections)
        return None

    def _begin_forward(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Tell the taps which micro-batch the forward that begins belongs to, if it is one of the window's."""
        taps = self._taps
        if taps is None or taps.scoring or not (model.training and torch.is_grad_enabled()):
            return
        taps.batch = None
        if self._waiting:
            batch = self._waiting.pop(0)
            if batch.index.shape != kwargs["labels"].shape:
                raise RuntimeError(
                    f"expected a micro-batch of shape {tuple(batch.index.shape)}, and the model got "
                    f"{tuple(kwargs['labels'].shape)}: another plugin runs the model in training mode inside the window"
                )
            taps.batch = batch
        elif self._own_gradients and self._step is None:
            self._begin_general(kwargs)

    @hookimpl
    def gradients_ready(self, gradients: GradientView, streams: Mapping[str, StreamGradient]) -> None:
        assert self._taps is not None
        self._taps.visitor = self._taps.batch = None
        if self._step is None:
            return
        step, self._step = self._step, None
        try:
            share = self._target_share(step)
        except FailedElsewhere:
            return
        update: GradientView = gradients
        target: GradientView | None = None
        if self.general == "stream":
            update, target = streams["general"].gradients, gradients
        elif self.keeps_target:
            target = streams["target"].gradients
        if target is not None and (self.with_target or share is not None):
            update = update if self.general == "train" else update.clone()
            if share is not None:
                self._add_target(update, target, share)
            else:
                update.axpy_(1.0, target)
        self._observer.step(self._steps_done + 1, step, update, target)
        if self.general == "stream":
            gradients.copy_(update)

    def _target_share(self, step: Step) -> Tensor | None:
        """(L,) float: the target's coefficient where the rule gives it one, which is collective; None elsewhere.

        Raises:
            Exception: what went wrong in this rank's backward pass.
            FailedElsewhere: something did in another's, and the exchange would wait for it.
        """

        def healthy() -> None:
            if step.failure is not None:
                raise step.failure

        if self._rule.name not in ("target", "ball"):
            healthy()
            return None
        together(healthy, self._context.device)
        return step.target_share()

    def _add_target(self, gradients: GradientView, target: GradientView, share: Tensor) -> None:
        """Add the target's gradient, by layer."""
        if self.scope == "global":
            gradients.axpy_(share[0], target)
            return
        by_parameter = {i: share[row] for row, layer in enumerate(self._layers) for i in layer.parameters}
        scaled = [None if t is None else t * by_parameter[i].to(t.dtype) for i, t in enumerate(target.tensors)]
        gradients.axpy_(1.0, GradientView(target.names, target.parameters, scaled))

    # -- the trainer's own data as the target ------------------------------------------------------------------------

    def _keep_own_gradients(self) -> None:
        """Hold on to the gradients of the trainer's own passes.

        The core sets `p.grad` aside while it runs the general stream, which is when these are the target. References
        are enough: DDP reduces into the same tensors.
        """

        def keep(i: int) -> Any:
            def after(parameter: Tensor) -> None:
                if self._step is None and parameter.grad is not None:
                    self._own_gradients[i] = parameter.grad

            return after

        for i, parameter in enumerate(self._context.weights.parameters):
            self._handles.append(parameter.register_post_accumulate_grad_hook(keep(i)))

    def _begin_general(self, kwargs: Mapping[str, Any]) -> None:
        """The forward after the window's last is the general stream's: choose in its backward pass."""
        assert self._taps is not None
        batch, tokens = samples_of_inputs(kwargs)
        target = [self._own_gradients.get(i) for i in range(len(self._context.names))]
        self._step = self._begin_step(Samples((batch,), tokens), target)
        self._taps.visitor, self._taps.batch = self._step.visitor(), batch
        self._observer.general([kwargs])

    # -- diagnostics -------------------------------------------------------------------------------------------------

    @hookimpl
    def metrics(self, mode: str) -> dict[str, float]:
        return self.recorder.metrics() if mode == "train" else {}

    def state_dict(self) -> dict[str, Any]:
        """What has been counted so far; the training does not depend on it."""
        return self._observer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self._observer.load_state_dict(state)
