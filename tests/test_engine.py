"""The engine works without a trainer: on a bare model, with the small records that a trainer would fill."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import Plugin
from torch import nn
from trl.trainer.utils import add_fused_lm_head

from trl_ext import hookimpl
from trl_ext.engine.context import RunContext
from trl_ext.engine.guard import Guard
from trl_ext.engine.passes import ExtraPasses
from trl_ext.engine.step import OptimizerStep
from trl_ext.engine.streams import Stream, stream_gradient
from trl_ext.engine.tally import LossTally
from trl_ext.errors import NonFiniteError
from trl_ext.gradients import trainable_parameters
from trl_ext.plugins.activation import activate
from trl_ext.records import StreamRequest, WeightsView
from trl_ext.testing.runs import tiny_model

CPU = torch.device("cpu")
ROWS = [
    {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]},
    {"input_ids": [9, 4, 3, 2], "labels": [-100, -100, 3, 2]},
]


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}


@dataclass
class Bare:
    """A model and what the engine needs beside it; `micro_steps` is the length of its windows."""

    plugins: tuple[Any, ...] = ()
    micro_steps: int = 1
    nonfinite: str = "raise"
    model: nn.Module = field(default_factory=tiny_model)
    done: int = 0

    def __post_init__(self) -> None:
        active = activate(None, self.plugins, trainer="sft")
        named = trainable_parameters(self.model)
        self.weights = WeightsView(tuple(named), tuple(named.values()), {}, sharded=False)
        self.run = RunContext(
            plugins=active,
            guard=Guard(active, CPU, 1, lambda: self.done),
            tally=LossTally(CPU),
            device=CPU,
            world_size=1,
            sum_over_ranks=lambda tensor: tensor,
            training=lambda: True,
            step=lambda: self.done,
            progress=lambda: 0.0,
            accumulation_steps=lambda: self.micro_steps,
        )
        self.passes = ExtraPasses(
            device=CPU,
            weights=lambda: self.weights,
            unwrapped=lambda: self.model,
            syncing=lambda: self.step.window.done == self.micro_steps - 1,
            reducing=lambda: True,
            surroundings=nullcontext,
            backward=torch.Tensor.backward,
            agree=self.run.guard.agree,
            to_device=dict,
        )
        self.step = OptimizerStep(self.run, self.passes, {}, self.nonfinite)


def test_a_streams_gradient_is_autograds_and_leaves_the_model_as_it_was():
    bare = Bare()
    add_fused_lm_head(bare.model, outputs=("log_probs", "entropy"))
    for p in bare.weights.parameters:
        p.grad = torch.ones_like(p)
    before = torch.get_rng_state()
    request = StreamRequest("general", batch_size=2, shuffle=False)
    stream = Stream(request, Dataset.from_list(ROWS), collate, seed=0, rank=0, world_size=1)
    found = stream_gradient(bare.run, bare.passes, bare.model, stream)

    batch = collate(ROWS)
    reference = tiny_model().double()
    reference.load_state_dict(bare.model.state_dict())
    labels = batch["labels"][:, 1:]
    logits = reference(input_ids=batch["input_ids"]).logits[:, :-1]
    loss = nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100])
    loss.backward()
    for mine, p in zip(found.gradients.tensors, trainable_parameters(reference).values(), strict=True):
        torch.testing.assert_close(mine.double(), p.grad, rtol=0, atol=2e-6)  # fp32 against fp64
    assert found.nll == pytest.approx(loss.item(), rel=1e-6)
    assert found.tokens == 5
    assert all(bool((p.grad == 1).all()) for p in bare.weights.parameters)
    assert torch.equal(torch.get_rng_state(), before)


@dataclass(eq=False)
class Watcher(Plugin):
    """Notes what it sees, and at what moment."""

    events: list[Any] = field(default_factory=list)

    @hookimpl
    def gradients_ready(self, gradients):
        self.events.append(("gradients_ready", float(gradients.tensors[0].sum())))

    @hookimpl
    def weights_updated(self, weights, step, skipped):
        self.events.append(("weights_updated", step, skipped))


def train(bare: Bare, events: list[Any], loss: float = 1.0) -> None:
    """One step as transformers makes it, with a constant gradient of one a micro-step."""
    bare.step.take_window([None] * bare.micro_steps, None)

    def micro_step() -> torch.Tensor:
        events.append("forward")
        for p in bare.weights.parameters:
            p.grad = torch.ones_like(p) if p.grad is None else p.grad + 1
        return torch.tensor(loss)

    for _ in range(bare.micro_steps):
        bare.step.micro_step(bare.model, micro_step)
    bare.step.agree(bare.model, torch.tensor(1.0))
    events.append("optimizer")
    bare.step.weights_updated(skipped=False)
    bare.done += 1


def test_a_step_calls_the_hooks_at_their_moments():
    watcher = Watcher()
    bare = Bare((watcher,), micro_steps=2)
    train(bare, watcher.events)
    train(bare, watcher.events)
    size = bare.weights.parameters[0].numel()
    first, second = (
        ["forward", "forward", ("gradients_ready", n * size), "optimizer", ("weights_updated", step, False)]
        for step, n in ((1, 2), (2, 4))  # gradients go on adding up here, since nothing sets them back
    )
    assert watcher.events == first + second


def test_a_step_that_is_not_finite_is_left_out_or_raises():
    watcher = Watcher()
    skipping = Bare((watcher,), nonfinite="skip")
    train(skipping, watcher.events, loss=float("nan"))
    assert watcher.events[-1] == ("weights_updated", 1, True)
    assert all(p.grad is None for p in skipping.weights.parameters)

    raising = Bare((Watcher(),))
    with pytest.raises(NonFiniteError, match=r"at step 1.*Watcher\.gradients_ready"):
        train(raising, [], loss=float("nan"))
