"""Auxiliary losses: what each `per` means over a window, against sums done by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import WITH_LOSSES, Plugin, assert_close, assert_equal_bits
from torch import Tensor

from trl_ext import hookimpl
from trl_ext.errors import PluginError
from trl_ext.records import AuxiliaryLoss, MicroStep
from trl_ext.testing.runs import MAKE, additions, logged, make_sft, moved, parameters

SGD = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0}
ROUNDING = {"rtol": 0, "atol": 5e-5}  # fp32 sums in another order, after steps that move weights by 1e-2
PADDING_FREE = {"padding_free": True, "max_length": None}


@dataclass(eq=False)
class Term(Plugin):
    """Squared log-probabilities, by token, by sample or as a batch's mean."""

    per: Any = "token"
    coefficient: float = 0.1
    values: list[tuple[float, int, int]] = field(default_factory=list)

    def value(self, step: MicroStep) -> Tensor:
        squares = torch.where(step.mask, step.log_probs, 0.0).square()
        return {"token": squares.sum(), "sequence": squares.sum(), "batch": squares.sum() / step.mask.sum()}[self.per]

    @hookimpl
    def auxiliary_losses(self, micro_step):
        value = self.value(micro_step)
        rows = len(micro_step.log_probs)
        self.values.append((float(value.detach()), int(micro_step.mask.sum()), rows))
        return {"squares": AuxiliaryLoss(self.coefficient * value, self.per)}


def expected(plugin: Term, kind: str, accumulation: int, samples: int | None = None) -> float:
    """The term's value for one window."""
    total = sum(value for value, _, _ in plugin.values)
    if plugin.per == "token":
        return plugin.coefficient * total / sum(tokens for _, tokens, _ in plugin.values)
    if plugin.per == "sequence":
        return plugin.coefficient * total / (samples or sum(rows for _, _, rows in plugin.values))
    return plugin.coefficient * total / accumulation


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("per", ["token", "sequence", "batch"])
@pytest.mark.parametrize("kind", WITH_LOSSES)
def test_a_windows_term_is_the_mean_it_says(tmp_path, kind, per, accumulation):
    plugin = Term(per)
    config = {"max_steps": 1, "gradient_accumulation_steps": accumulation, "learning_rate": 0.0}
    ours = MAKE[kind](tmp_path / "a" / "run", plugins=[plugin], **config)
    ours.train()
    plain = MAKE[kind](tmp_path / "b" / "run", plain=True, **config)
    plain.train()
    assert len(plugin.values) == accumulation
    value = expected(plugin, kind, accumulation)
    assert value > 0.1
    # The loss in the log is the sum over the window in SFT, where the token count divides, and in GRPO.
    assert logged(ours)[0]["Term/squares"] == pytest.approx(value, rel=1e-5)
    assert logged(ours)[0]["loss"] - logged(plain)[0]["loss"] == pytest.approx(value, rel=1e-4)


def test_samples_are_counted_under_padding_free(tmp_path):
    plugin = Term("sequence")
    config = {"max_steps": 1, "gradient_accumulation_steps": 2, "learning_rate": 0.0, **PADDING_FREE}
    trainer = make_sft(tmp_path, plugins=[plugin], **config)
    trainer.train()
    assert logged(trainer)[0]["Term/squares"] == pytest.approx(expected(plugin, "sft", 2, samples=8), rel=1e-5)


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_one_batch_of_eight_is_eight_of_one(tmp_path, per):
    finals = []
    for batch, accumulation in ((8, 1), (1, 8), (4, 2)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = make_sft(tmp_path, plugins=[Term(per)], **SGD, **sizes)
        start = parameters(trainer)
        trainer.train()
        assert moved(trainer, start) > 1e-2
        finals.append(parameters(trainer))
    for other in finals[1:]:
        assert_close(other, finals[0], **ROUNDING)


def test_padding_free_agrees_with_padding(tmp_path):
    finals = []
    for extra in ({}, PADDING_FREE):
        trainer = make_sft(tmp_path, plugins=[Term("sequence")], **SGD, **extra)
        trainer.train()
        finals.append(parameters(trainer))
    assert_close(finals[1], finals[0], rtol=0, atol=2e-5)  # steps of about 0.1, attention summed in another order


@dataclass(eq=False)
class MoreNll(Plugin):
    """The main loss once more."""

    label: str = ""
    coefficient: float = 1.0

    @hookimpl
    def auxiliary_losses(self, micro_step):
        return {"nll": AuxiliaryLoss(-self.coefficient * micro_step.log_probs.sum(), "token")}


@pytest.mark.parametrize("config", [{}, {"gradient_accumulation_steps": 3, "max_steps": 7}], ids=["one", "short last"])
def test_a_term_has_the_gradient_of_its_value(tmp_path, config):
    """0.25 + 0.75 times the NLL beside the NLL: the gradient of twice the NLL, from two plugins."""
    plain = make_sft(tmp_path / "a", plain=True, **{**SGD, **config, "learning_rate": 0.4})
    start = parameters(plain)
    plain.train()
    plugins = [MoreNll("quarter", 0.25), MoreNll("rest", 0.75)]
    ours = make_sft(tmp_path / "b", plugins=plugins, **{**SGD, **config, "learning_rate": 0.2})
    ours.train()
    assert moved(plain, start) > 1e-2
    assert_close(parameters(ours), parameters(plain), **ROUNDING)
    for mine, theirs in zip(logged(ours)[:-1], logged(plain)[:-1], strict=True):
        assert mine["quarter/nll"] == pytest.approx(0.25 * theirs["loss"], rel=1e-4)
        assert mine["rest/nll"] == pytest.approx(0.75 * theirs["loss"], rel=1e-4)
        assert mine["nll"] == pytest.approx(theirs["loss"], rel=1e-4)


@pytest.mark.parametrize("kind", WITH_LOSSES)
def test_a_term_of_zero_changes_nothing(tmp_path, kind):
    finals = []
    for plugins in ({"plain": True}, {"plugins": [Term(coefficient=0.0)]}):
        trainer = MAKE[kind](tmp_path / str(len(finals)) / "run", **plugins)
        trainer.train()
        finals.append(parameters(trainer))
    assert_equal_bits(finals[1], finals[0])


def test_evaluation_has_no_auxiliary_loss(tmp_path):
    plugin = Term()
    held_out = {"eval_dataset": additions(4, seed=5)}
    ours = make_sft(tmp_path / "a", plugins=[plugin], trainer=held_out).evaluate()
    plain = make_sft(tmp_path / "b", plain=True, trainer=held_out).evaluate()
    assert not plugin.values
    assert ours["eval_loss"] == plain["eval_loss"]


def test_the_logged_value_is_the_mean_over_the_steps_of_the_interval(tmp_path):
    plugin = Term("batch")
    config = {"max_steps": 4, "logging_steps": 2, "learning_rate": 0.0}
    trainer = make_sft(tmp_path, plugins=[plugin], **config)
    trainer.train()
    values = [0.1 * value for value, _, _ in plugin.values]
    shown = [entry["Term/squares"] for entry in logged(trainer) if "Term/squares" in entry]
    assert shown == pytest.approx([sum(values[:2]) / 2, sum(values[2:]) / 2], rel=1e-5)


def test_a_term_is_logged_with_its_value_where_nonfinite_is_ignored(tmp_path):
    plugin = Term("batch")
    trainer = make_sft(tmp_path, plugins=[plugin], max_steps=1, learning_rate=0.0, nonfinite="ignore")
    trainer.train()
    assert logged(trainer)[0]["Term/squares"] == pytest.approx(0.1 * plugin.values[0][0], rel=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        AuxiliaryLoss(torch.ones(2), "token"),
        AuxiliaryLoss(torch.ones(()), "word"),  # type: ignore[arg-type]
        torch.ones(()),
    ],
    ids=["shape", "per", "type"],
)
@pytest.mark.parametrize("kind", WITH_LOSSES)
def test_anything_but_a_scalar_term_is_refused(tmp_path, kind, wrong):
    @dataclass(eq=False)
    class Odd(Plugin):
        @hookimpl
        def auxiliary_losses(self):
            return {"odd": wrong}

    trainer = MAKE[kind](tmp_path / "run", plugins=[Odd()])
    with pytest.raises(PluginError, match=r"'Odd'.*hook 'auxiliary_losses' at step 1: TypeError: term 'odd' is"):
        trainer.train()
