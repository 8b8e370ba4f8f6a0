"""A user's subclass of a trainer: what it adds to TRL's methods works, and what it replaces is not passed over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import trl
from helpers import Nll, Plugin, assert_equal_bits

import trl_ext
from trl_ext import hookimpl
from trl_ext.errors import ConfigurationError
from trl_ext.records import AuxiliaryLoss
from trl_ext.testing.runs import MAKE, make_sft, parameters


class Weighs(Plugin):
    @hookimpl
    def sample_weights(self, window):
        return torch.ones(window.num_samples)


class Adds(Plugin):
    @hookimpl
    def auxiliary_losses(self, micro_step):
        return {"term": AuxiliaryLoss(micro_step.log_probs.mean(), "batch")}


class Policy(Plugin):
    @hookimpl
    def policy_loss(self, tokens):
        return -tokens.log_probs * tokens.advantages


class Shapes(Plugin):
    @hookimpl
    def advantages(self, advantages):
        return advantages


BYPASSED = [
    ("sft", "compute_loss", Nll, "per_token_loss"),
    ("sft", "compute_loss", Weighs, "sample_weights"),
    ("sft", "compute_loss", Adds, "auxiliary_losses"),
    ("grpo", "_compute_loss", Policy, "policy_loss"),
    ("grpo", "_compute_loss", Adds, "auxiliary_losses"),
    ("grpo", "_generate_and_score_completions", Shapes, "advantages"),
    ("dpo", "compute_loss", Adds, "auxiliary_losses"),
    ("rloo", "_compute_loss", Policy, "policy_loss"),
    ("rloo", "_generate_and_score_completions", Shapes, "advantages"),
]


@pytest.mark.parametrize(("kind", "method", "plugin", "hook"), BYPASSED)
def test_a_method_that_replaces_the_caller_of_a_hook_is_refused(tmp_path, monkeypatch, kind, method, plugin, hook):
    name = f"{kind.upper()}Trainer"

    def own(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(getattr(trl, name), method)(self, *args, **kwargs)  # as a copy of TRL's body would

    monkeypatch.setattr(trl_ext, name, type("Mine", (getattr(trl_ext, name),), {method: own}))
    trainer = MAKE[kind](tmp_path / "run", plugins=[plugin()])
    start = parameters(trainer)
    with pytest.raises(ConfigurationError) as refused:
        trainer.train()
    where = f"in which '{hook}' of plugin '{plugin.__name__}' is called; call super().{method}(...) there"
    assert str(refused.value).startswith(f"Mine does without TRL's {method}, {where}")
    assert_equal_bits(parameters(trainer), start)


def test_a_method_that_adds_to_the_callers_result_trains_with_plugins(tmp_path, monkeypatch):
    def decayed(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        norm = sum(p.square().sum() for p in self.model.parameters())
        return super(type(self), self).compute_loss(model, *args, **kwargs) + 1e-3 * norm

    finals = []
    for library in (trl, trl_ext):
        monkeypatch.setattr(library, "SFTTrainer", type("Mine", (library.SFTTrainer,), {"compute_loss": decayed}))
        ours: dict[str, Any] = {"plain": True} if library is trl else {"plugins": [Nll()]}
        trainer = make_sft(tmp_path / library.__name__, gradient_accumulation_steps=2, **ours)
        trainer.train()
        finals.append(parameters(trainer))
    assert_equal_bits(*finals)
