"""NaN and infinity are found before the optimiser's step: the run stops, or leaves the step out, and never logs 0.0."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import FIRST, Idle, Plugin, assert_equal_bits

from trl_ext import hookimpl
from trl_ext.errors import ConfigurationError, NonFiniteError
from trl_ext.records import AuxiliaryLoss, StreamRequest
from trl_ext.testing.runs import MAKE, additions, logged, make_sft, parameters


@dataclass(eq=False)
class BadLoss(Plugin):
    """Makes the loss of the given micro-steps (counted from 0) not finite."""

    at: tuple[int, ...] = (4,)
    value: float = math.nan
    micro_steps: int = 0

    @hookimpl
    def auxiliary_losses(self, micro_step):
        bad = self.micro_steps in self.at
        self.micro_steps += 1
        return {"bad": AuxiliaryLoss((self.value if bad else 0.0) * micro_step.log_probs.sum(), "token")}


@dataclass(eq=False)
class BadGradient(Plugin):
    """Spoils one element of the gradient at the given steps (counted from 0)."""

    at: tuple[int, ...] = (2,)
    value: float = math.inf
    steps: int = 0

    @hookimpl
    def gradients_ready(self, gradients):
        if self.steps in self.at:
            gradients.tensors[-1].view(-1)[0] = self.value
        self.steps += 1


@dataclass(eq=False)
class Watch(Plugin):
    """Notes weights, optimiser state and the `skipped` flag after every step."""

    optimizer: Any = None
    skipped: list[bool] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    weights: list[list[torch.Tensor]] = field(default_factory=list)
    moments: list[list[torch.Tensor]] = field(default_factory=list)

    @hookimpl
    def wrap_optimizer(self, optimizer):
        self.optimizer = optimizer
        return optimizer

    @hookimpl
    def weights_updated(self, weights, step, skipped):
        self.steps.append(step)
        self.skipped.append(skipped)
        self.weights.append([w.clone() for w in weights.local()])
        states = self.optimizer.state.values()
        self.moments.append([value.clone() for state in states for value in state.values()])


BAD: dict[str, Callable[[], Plugin]] = {
    "nan loss": BadLoss,
    "infinite loss": lambda: BadLoss(value=math.inf),
    "infinite gradient": BadGradient,
    "nan gradient": lambda: BadGradient(value=math.nan),
}
# Two micro-batches a step: micro-step 4 is the first of step 3.
TWO = {"gradient_accumulation_steps": 2, "max_steps": 5}


@pytest.mark.parametrize("clip", [1.0, 0.0], ids=["clipping", "no clipping"])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", FIRST)
def test_the_run_stops_before_the_step_and_names_the_last_hook(tmp_path, kind, bad, clip):
    plugin, watch = BAD[bad](), Watch()
    trainer = MAKE[kind](tmp_path / "run", plugins=[plugin, watch], max_grad_norm=clip, **TWO)
    hook = "auxiliary_losses" if isinstance(plugin, BadLoss) else "gradients_ready"
    match = rf"at step 3, found before the optimiser's step; the last hook.*: {type(plugin).__name__}\.{hook}"
    with pytest.raises(NonFiniteError, match=match):
        trainer.train()
    assert trainer.state.global_step == 2
    assert_equal_bits(parameters(trainer), dict(zip(parameters(trainer), watch.weights[-1], strict=True)))


@pytest.mark.parametrize("kind", [*FIRST, "dpo"])
@pytest.mark.parametrize("bad", BAD)
def test_a_skipped_step_leaves_weights_and_optimiser_alone(tmp_path, kind, bad):
    plugin, watch = BAD[bad](), Watch()
    trainer = MAKE[kind](tmp_path / "run", plugins=[plugin, watch], nonfinite="skip", **TWO)
    trainer.train()
    assert watch.steps == [1, 2, 3, 4, 5]
    assert watch.skipped == [False, False, True, False, False]
    for before, after in ((watch.weights[1], watch.weights[2]), (watch.moments[1], watch.moments[2])):
        assert before
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(watch.weights[2], watch.weights[3], strict=True))
    assert all(p.isfinite().all() for p in parameters(trainer).values())
    entries = [entry for entry in logged(trainer) if "learning_rate" in entry]
    assert [entry.get("skipped_steps") for entry in entries] == [None, None, 1.0, None, None]
    assert math.isnan(entries[2]["loss"])
    assert all(math.isfinite(entry["loss"]) for i, entry in enumerate(entries) if i != 2)
    if kind == "sft":
        assert all(entry["loss"] != 0 for entry in entries)


def test_the_logged_loss_is_the_mean_of_the_steps_taken(tmp_path):
    """Without a learning rate, steps are independent: the good ones log as in a run without a bad one."""
    config = {"max_steps": 4, "learning_rate": 0.0}
    single = make_sft(tmp_path / "a", plugins=[Idle()], **config)
    single.train()
    losses = [entry["loss"] for entry in logged(single)[:4]]
    skipping = make_sft(tmp_path / "b", plugins=[BadLoss(at=(1,))], nonfinite="skip", logging_steps=4, **config)
    skipping.train()
    mean = (losses[0] + losses[2] + losses[3]) / 3
    shown = logged(skipping)
    assert shown[0]["loss"] == pytest.approx(mean, rel=1e-6)
    assert shown[0]["skipped_steps"] == 1
    assert shown[-1]["train_loss"] == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_nan_is_never_logged_as_zero(tmp_path, logging_steps):
    """All steps skipped: transformers puts the average so far, 0.0, in place of a NaN loss."""
    plugin = BadLoss(at=tuple(range(3)))
    trainer = make_sft(tmp_path, plugins=[plugin], nonfinite="skip", max_steps=3, logging_steps=logging_steps)
    start = parameters(trainer)
    trainer.train()
    assert_equal_bits(parameters(trainer), start)
    shown = [entry["loss"] for entry in logged(trainer) if "loss" in entry]
    assert len(shown) == 3 // logging_steps
    assert all(math.isnan(loss) for loss in shown)
    assert math.isnan(logged(trainer)[-1]["train_loss"])
    assert sum(entry.get("skipped_steps", 0) for entry in logged(trainer)) == 3


def test_a_later_interval_logs_its_own_loss(tmp_path):
    config = {"max_steps": 4, "learning_rate": 0.0, "logging_steps": 2}
    skipping = make_sft(tmp_path / "a", plugins=[BadLoss(at=(0, 1))], nonfinite="skip", **config)
    single = make_sft(tmp_path / "b", plugins=[Idle()], **config)
    for trainer in (skipping, single):
        trainer.train()
    assert math.isnan(logged(skipping)[0]["loss"])
    assert logged(skipping)[1]["loss"] == pytest.approx(logged(single)[1]["loss"], rel=1e-6)


def test_a_bad_stream_is_found(tmp_path):
    @dataclass(eq=False)
    class Spoils(Plugin):
        @hookimpl
        def streams(self):
            return [StreamRequest("general", batch_size=2)]

        @hookimpl
        def gradients_ready(self, gradients, streams):
            gradients.axpy_(math.inf, streams["general"].gradients)

    trainer = make_sft(tmp_path, plugins=[Spoils()], streams={"general": additions(4)})
    with pytest.raises(NonFiniteError, match=r"at step 1, .* Spoils\.gradients_ready"):
        trainer.train()


def test_without_plugins_the_setting_guards_too(tmp_path):
    """`nonfinite` is a setting of the run; without plugins it is off by default, as in TRL."""

    def spoiled(nonfinite: str | None) -> Any:
        trainer = make_sft(tmp_path, nonfinite=nonfinite, max_steps=3)
        with torch.no_grad():
            trainer.model.lm_head.weight[0, 0] = math.nan
        return trainer

    with pytest.raises(NonFiniteError, match=r"at step 1, .* no hook touched it"):
        spoiled("raise").train()
    skipping = spoiled("skip")
    skipping.train()
    assert math.isnan(logged(skipping)[-1]["train_loss"])
    ignoring = spoiled(None)
    ignoring.train()
    assert ignoring.state.global_step == 3


def test_ignoring_does_as_trl_does(tmp_path):
    trainer = make_sft(tmp_path, plugins=[BadGradient(at=(0,), value=math.nan)], nonfinite="ignore", max_steps=2)
    trainer.train()
    assert any(p.isnan().any() for p in parameters(trainer).values())


def test_an_unknown_choice_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="nonfinite: 'stop' is not one of raise, skip, ignore"):
        make_sft(tmp_path, nonfinite="stop")


def test_an_infinite_gradient_under_fp16_is_left_to_the_scaler(tmp_path):
    """It leaves such a step out and takes a smaller scale. One that only counts stands for it: a CPU has no fp16."""
    trainer = make_sft(tmp_path / "run", plugins=[BadGradient(at=(2,))], max_steps=3)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", enabled=False)
    trainer.train()
    assert trainer.state.global_step == 3
