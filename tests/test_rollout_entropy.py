"""The entropy that a plugin may ask of rollouts is that of full logits under the policy that the update starts from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from helpers import Plugin, assert_equal_bits, ending_model

from trl_ext import hookimpl
from trl_ext.errors import ConfigurationError
from trl_ext.records import Rollouts
from trl_ext.testing.runs import additions, logged, make_grpo, moved, parameters, tiny_model
from trl_ext.testing.runs import lora as adapter

TEMPERATURE = 0.7


@dataclass(eq=False)
class Keeps(Plugin):
    """Keeps the rollouts, and what full logits say of their entropy at that moment."""

    trainers: ClassVar[tuple[str, ...]] = ("grpo",)
    kept: list[tuple[Rollouts, torch.Tensor]] = field(default_factory=list)
    model: Any = None

    @hookimpl
    def setup(self, context):
        self.model = context.model

    @hookimpl
    def advantages(self, rollouts, advantages):
        ids = torch.cat([rollouts.prompt_ids, rollouts.completion_ids], dim=1)
        attended = torch.cat([rollouts.prompt_mask, rollouts.mask], dim=1)
        with torch.no_grad():
            logits = self.model(input_ids=ids, attention_mask=attended, use_cache=False).logits.double()
        log_probs = (logits[:, rollouts.prompt_ids.shape[1] - 1 : -1] / TEMPERATURE).log_softmax(-1)
        self.kept.append((rollouts, -(log_probs.exp() * log_probs).sum(-1)))
        return advantages


@dataclass(eq=False)
class Asks(Keeps):
    rollout_outputs: ClassVar[tuple[str, ...]] = ("entropy",)


@dataclass(eq=False)
class Reads(Plugin):
    """Runs no model of its own."""

    seen: bool = False

    @hookimpl
    def advantages(self, rollouts, advantages):
        self.seen = rollouts.entropy is not None
        return advantages


@dataclass(eq=False)
class ReadsEntropy(Reads):
    rollout_outputs: ClassVar[tuple[str, ...]] = ("entropy",)


SCHEDULES = {
    "on policy": {"gradient_accumulation_steps": 2},
    "old log-probabilities": {"num_iterations": 2},
    "with a reference": {"num_iterations": 2, "beta": 0.1},
    "with an adapter's reference": {"beta": 0.1, "lora": True},
}


def run(folder, plugin: Keeps, lora: bool = False, **schedule: Any) -> Any:
    options = {"trainer": {"peft_config": adapter()}} if lora else {}
    return make_grpo(
        folder / "run", model=ending_model(), plugins=[plugin], temperature=TEMPERATURE, **options, **schedule
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_entropy_is_that_of_full_logits_and_changes_nothing(tmp_path, schedule: str) -> None:
    plain, asking = Keeps(), Asks()
    trainers = []
    for plugin in (plain, asking):
        trainers.append(run(tmp_path / type(plugin).__name__, plugin, **SCHEDULES[schedule]))
        start = parameters(trainers[-1])
        trainers[-1].train()
        assert moved(trainers[-1], start) > 1e-3
    assert_equal_bits(parameters(trainers[1]), parameters(trainers[0]))
    assert logged(trainers[0]) == logged(trainers[1])
    assert all(rollouts.entropy is None for rollouts, _ in plain.kept)
    assert any((rollouts.mask == 0).any() for rollouts, _ in asking.kept), "completions differ in length"
    for rollouts, expected in asking.kept:
        mask = rollouts.mask.bool()
        assert rollouts.entropy.shape == rollouts.completion_ids.shape
        assert not rollouts.entropy.requires_grad
        # fp32 statistics against fp64 of fp32 logits
        torch.testing.assert_close(rollouts.entropy[mask].double(), expected[mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("schedule", "extra"), [("on policy", 1), ("old log-probabilities", 0)])
def test_it_costs_one_forward_where_there_are_no_old_log_probs_and_else_none(tmp_path, schedule: str, extra: int):
    counts = []
    for i, plugin in enumerate((Keeps(), Asks())):
        trainer = run(tmp_path / str(i), plugin, **SCHEDULES[schedule], max_steps=1)
        rows = [0]
        trainer.model.register_forward_pre_hook(
            lambda model, args, kwargs, rows=rows: rows.append(
                len(kwargs["input_ids"]) * bool(kwargs.get("labels") is not None)
            ),
            with_kwargs=True,
        )
        trainer.train()
        counts.append(sum(rows))
    generated = len(plugin.kept[0][0].completions)
    assert counts[1] - counts[0] == extra * generated


def test_the_dropout_of_the_update_is_that_of_a_run_without_it(tmp_path) -> None:
    trainers = []
    for i, plugin in enumerate((Reads(), ReadsEntropy())):
        model = tiny_model(attention_dropout=0.5)
        trainers.append(make_grpo(tmp_path / str(i), model=model, plugins=[plugin], **SCHEDULES["on policy"]))
        start = parameters(trainers[-1])
        trainers[-1].train()
        assert moved(trainers[-1], start) > 1e-3
    assert plugin.seen
    assert_equal_bits(parameters(trainers[1]), parameters(trainers[0]))


def test_evaluation_has_it_too(tmp_path) -> None:
    plugin = Asks()
    trainer = make_grpo(
        tmp_path / "run",
        model=ending_model(),
        plugins=[plugin],
        trainer={"eval_dataset": additions(4, "prompt_only", seed=5)},
        temperature=TEMPERATURE,
        max_steps=1,
    )
    trainer.train()
    trainer.evaluate()
    rollouts, expected = plugin.kept[-1]
    assert not rollouts.training
    mask = rollouts.mask.bool()
    torch.testing.assert_close(rollouts.entropy[mask].double(), expected[mask], rtol=1e-4, atol=1e-4)


def test_an_unknown_output_is_refused(tmp_path) -> None:
    plugin = Keeps()
    plugin.rollout_outputs = ("logits",)
    with pytest.raises(
        ConfigurationError, match=r"declares rollout_outputs = \('logits',\); what it may name is 'entropy'"
    ):
        make_grpo(tmp_path / "run", plugins=[plugin])
