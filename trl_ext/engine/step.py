"""One optimiser step on one screen: the order in which it calls plugins, and where the ranks agree.

    take_window      the data loader's micro-batches are noted
    micro_step       the first:  `begin_window`: "before" streams, `sample_weights`
                     each:       TRL's forward and backward, with the losses of plugins inside of TRL's loss:
                                 `per_token_loss` (sft_loss.py) or `policy_loss` (grpo_loss.py),
                                 `auxiliary_losses` (losses.py)
                     the last:   `end_window`: "after" streams, `gradients_ready`
                     TRL clips the gradients
    agree            failures of hooks and finite gradients, on all ranks alike
                     the optimiser steps
    weights_updated  `weights_updated`
    end              whether replicas are still the same, every `rank_check_steps`

    end_training     `end`, once, after the last step

The overrides of trainers/stepping.py call these methods in this order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trl_ext.engine.context import AccumulationWindow, RunContext
from trl_ext.engine.passes import ExtraPasses
from trl_ext.engine.rank_comparison import compare_ranks, replicated_states
from trl_ext.engine.sample_weights import SampleWeighting
from trl_ext.engine.streams import Stream, stream_gradient
from trl_ext.engine.zero import flat_shards
from trl_ext.gradients import GradientView, trainable_parameters, whole_tensor
from trl_ext.records import StreamGradient

logger = logging.getLogger(__name__)


@dataclass
class OptimizerStep:
    """The optimiser steps of one run, one after the other."""

    run: RunContext
    passes: ExtraPasses
    streams: Mapping[str, Stream]
    """Auxiliary data sets by role."""
    nonfinite: str
    """What to do on a NaN or infinite loss or gradient: "raise", "skip" or "ignore"."""
    rank_check_steps: int = 0
    """Optimiser steps between comparisons of ranks; 0 for none."""
    skippable: bool = True
    """Whether this run could leave out steps (`nonfinite="skip"`)."""
    weighting: SampleWeighting | None = None
    """SFT: asks for the weights of the window's samples."""
    window: AccumulationWindow = field(default_factory=AccumulationWindow)
    skipped: bool = False
    """Whether this step is left out because its loss or gradient was not finite."""
    _before: dict[str, StreamGradient] = field(default_factory=dict)
    _finite: Tensor | bool = True
    _told_of_shards: bool = False

    def take_window(self, micro_batches: Sequence[Any], num_items: Tensor | int | None) -> None:
        """Note the next window. Nothing more: on resume this runs before the random state is restored."""
        self.window.start(micro_batches, num_items)
        self._finite = True

    def micro_step(self, model: nn.Module, train: Callable[[], Tensor]) -> Tensor:
        """Train on the window's next micro-batch: `train` is TRL's training step of the wrapped model."""
        if self.run.plugins and self.window.done == 0:
            model.train()  # as TRL is about to; after an evaluation it is not yet
            self.begin_window(model)
        loss = train()
        if self.run.plugins and self.passes.syncing():
            self.end_window(model)
        self._note(loss)
        self.window.done += 1
        return loss

    def begin_window(self, model: nn.Module) -> None:
        """Before the window's first forward."""
        before = self._stream_gradients(model, "before")
        if self.weighting is not None:
            self.weighting.begin_window(model, self.window, before)
        self._before = {role: gradient for role, gradient in before.items() if self.streams[role].request.keep}

    def end_window(self, model: nn.Module) -> None:
        """After the window's last backward: gradients are reduced and not clipped yet."""
        streams = {**self._before, **self._stream_gradients(model, "after")}
        self._before = {}
        if self.run.plugins.implements("gradients_ready"):
            weights, guard = self.passes.weights(), self.run.guard
            view = GradientView(weights.names, weights.parameters, agree=guard.agree)
            guard.run_all("gradients_ready", gradients=view, streams=streams)
            if weights.sharded:
                guard.agree()

    def agree(self, model: nn.Module, grad_norm: Tensor | float) -> None:
        """After clipping, right before the optimiser: all ranks agree on failures and on finiteness. Collective.

        `grad_norm` is () the global norm before clipping. A skipped step takes the gradients from the model.

        Raises:
            PluginError: a hook failed on some rank.
            NonFiniteError: with nonfinite="raise".
        """
        if self.nonfinite == "ignore":
            if self.run.plugins:
                self.run.guard.agree()
            self.run.tally.end_step(skipped=False)
            return
        norm = whole_tensor(grad_norm) if isinstance(grad_norm, Tensor) else grad_norm
        self.skipped = not self.run.guard.agree_finite(norm, self._finite)
        if self.skipped:
            if self.nonfinite == "raise":
                raise self.run.guard.non_finite(self.skippable)
            for parameter in model.parameters():
                parameter.grad = None  # optimisers leave parameters without a gradient, and their moments, alone
        self.run.tally.end_step(self.skipped)

    def weights_updated(self, skipped: bool) -> None:
        """After the optimiser's step; `skipped` says whether accelerate left it out."""
        if self.run.plugins.implements("weights_updated"):
            weights, step = self.passes.weights(), self.run.step() + 1
            self.run.guard.run_all("weights_updated", weights=weights, step=step, skipped=skipped or self.skipped)
            self.run.guard.agree()

    def end(self) -> None:
        """After the step is counted: raises on every rank if what should be replicated differs. Collective."""
        run, every = self.run, self.rank_check_steps
        if not every or run.world_size == 1 or run.step() % every:
            return
        named = trainable_parameters(self.passes.unwrapped())
        parameters = dict(zip(named, flat_shards(named.values()), strict=True))
        alone = compare_ranks(parameters, replicated_states(run.guard), run.guard.gather, run.step())
        if alone and not self._told_of_shards:
            self._told_of_shards = True
            logger.warning(
                "rank_check_steps: %d of %d parameters are shards that one rank alone holds, such as '%s'; they cannot "
                "be compared. What all ranks hold of parameters and of plugins' states is compared",
                *(len(alone), len(parameters), alone[0]),
            )

    def end_training(self) -> None:
        """After the last step, and what is logged, evaluated and saved with it. Collective."""
        if self.run.plugins.implements("end"):
            self.run.guard.run_all("end", weights=self.passes.weights(), step=self.run.step())
            self.run.guard.agree()

    @property
    def out_of_data(self) -> bool:
        """Whether a stream that is to end the training has no full batch left."""
        return any(stream.exhausted and stream.request.on_exhausted == "stop" for stream in self.streams.values())

    def _stream_gradients(self, model: nn.Module, when: Literal["before", "after"]) -> dict[str, StreamGradient]:
        gradients = {}
        for role, stream in self.streams.items():
            if stream.request.when == when:
                gradients[role] = stream_gradient(self.run, self.passes, model, stream)
                self.run.tally.add_stream(role, gradients[role].nll)
        return gradients

    def _note(self, loss: Tensor) -> None:
        if self.nonfinite != "ignore":
            self._finite = torch.isfinite(loss) & self._finite
        if self.nonfinite == "skip":
            self.run.tally.add_step_loss(loss)
