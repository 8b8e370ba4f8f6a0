"""Numbers that would be wrong without a sign are right, or the run stops and says which line to change."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import pytest
import torch
from helpers import FIRST, Idle, Nll, Plugin, ending_model
from peft import PeftModel, get_peft_model
from schedulefree import AdamWScheduleFree

from trl_ext import SFTConfig, SFTTrainer, hookimpl
from trl_ext.errors import ConfigurationError, NonFiniteError, PluginError
from trl_ext.records import AuxiliaryLoss
from trl_ext.testing.runs import (
    COMMON,
    MAKE,
    additions,
    logged,
    lora,
    make_grpo,
    make_sft,
    parameters,
    tiny_model,
    tokenizer,
    varied_reward,
)


@dataclass(eq=False)
class Constant(Plugin):
    """An auxiliary loss of 1 for each row, whatever the number of tokens; notes the label tokens of each micro-step."""

    per: Any = "token"
    tokens: list[int] = field(default_factory=list)

    @hookimpl
    def auxiliary_losses(self, micro_step):
        self.tokens.append(int(micro_step.mask.sum()))
        return {"rows": AuxiliaryLoss(0 * micro_step.log_probs.sum() + len(micro_step.log_probs), self.per)}


# -- auxiliary losses of GRPO per label token ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accumulation", "generation", "iterations"), [(1, 2, 1), (2, 4, 1), (1, 3, 2), (2, 3, 2)], ids=str
)
def test_a_grpo_term_per_token_is_divided_by_its_own_windows_tokens(tmp_path, accumulation, generation, iterations):
    """A generation batch of several windows: each has its own number of label tokens."""
    plugin = Constant()
    sizes = {"gradient_accumulation_steps": accumulation, "steps_per_generation": generation}
    steps = generation * iterations // accumulation
    settings = {"num_iterations": iterations, "max_steps": steps, **sizes}
    trainer = make_grpo(tmp_path / "run", plugins=[plugin], model=ending_model(), **settings)
    trainer.train()
    windows = [sum(plugin.tokens[i : i + accumulation]) for i in range(0, len(plugin.tokens), accumulation)]
    assert len(set(windows)) > 1, "windows of equal length show nothing"
    shown = [entry["Constant/rows"] for entry in logged(trainer) if "Constant/rows" in entry]
    assert shown == pytest.approx([4 * accumulation / tokens for tokens in windows], rel=1e-6)


def test_a_grpo_term_per_token_is_refused_where_the_window_outlasts_its_completions(tmp_path):
    sizes = {"gradient_accumulation_steps": 2, "steps_per_generation": 1, "max_steps": 1}
    message = (
        r"'Constant'.*'auxiliary_losses' at step 1: ValueError: term 'rows' is per token.*make steps_per_generation"
    )
    with pytest.raises(PluginError, match=message):
        make_grpo(tmp_path / "run", plugins=[Constant()], **sizes).train()
    make_grpo(tmp_path / "run", plugins=[Constant("sequence")], **sizes).train()


# -- the table of completions ----------------------------------------------------------------------------------------


@dataclass(eq=False)
class Ranked(Plugin):
    """Advantages that count the completions from 0, for each completion or for each token."""

    per_token: bool = False
    first: float = 0.0
    calls: int = 0

    @hookimpl
    def advantages(self, advantages, rollouts):
        self.calls += 1
        ranked = torch.arange(len(advantages), dtype=advantages.dtype)
        ranked[0] = self.first
        if not self.per_token:
            return ranked
        outside = torch.where(rollouts.mask.bool(), 0.0, 99.0)  # nothing is trained on there
        return outside + ranked[:, None]


@pytest.mark.parametrize("per_token", [False, True], ids=["completion", "token"])
def test_the_table_of_completions_shows_the_advantages_trained_on(tmp_path, per_token):
    files = {"log_completions": True, "num_completions_to_print": 0, "max_steps": 2, "steps_per_generation": 2}
    trainer = make_grpo(tmp_path / "run", plugins=[Ranked(per_token)], **files)
    trainer.train()
    table = pd.read_parquet(tmp_path / "run" / "completions" / "completions_00001.parquet")
    assert table["advantage"].tolist() == pytest.approx(list(range(8)))


def test_evaluation_shows_its_advantages_too(tmp_path):
    held_out = {"eval_dataset": additions(4, "prompt_only", seed=5)}
    trainer = make_grpo(tmp_path / "run", plugins=[Ranked()], trainer=held_out)
    trainer.evaluate()
    assert list(trainer._logs["advantages"]) == [0, 1, 2, 3]


# -- rewards and advantages that are not numbers ---------------------------------------------------------------------


def fails_in_step_two(value: float) -> Any:
    """A reward function whose second call gives `value` for one completion."""
    calls = 0

    def spoiled(completions: list[str], **columns: Any) -> list[float]:
        nonlocal calls
        calls += 1
        rewards = varied_reward(completions)
        return [*rewards[:-1], value] if calls == 2 else rewards

    return spoiled


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_stops_the_run(tmp_path, value):
    plugin = Ranked()
    trainer = make_grpo(tmp_path / "run", plugins=[plugin], reward=fails_in_step_two(value))
    with pytest.raises(
        NonFiniteError, match=r"at step 2 reward function 'spoiled' gave .* for 1 of 4 .* nonfinite='skip'"
    ):
        trainer.train()
    assert (trainer.state.global_step, plugin.calls) == (1, 1)


def test_a_step_with_such_a_reward_is_left_out(tmp_path):
    trainer = make_grpo(tmp_path / "run", plugins=[Ranked()], reward=fails_in_step_two(math.inf), nonfinite="skip")
    trainer.train()
    assert [entry.get("skipped_steps") for entry in logged(trainer)[:4]] == [None, 1, None, None]
    assert all(p.isfinite().all() for p in parameters(trainer).values())


def test_none_is_a_reward_still(tmp_path):
    trainer = make_grpo(tmp_path / "run", plugins=[Ranked()], reward=fails_in_step_two(None))
    trainer.train()
    assert trainer.state.global_step == 4


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_plugins_advantages_are_numbers(tmp_path, value):
    trainer = make_grpo(tmp_path / "run", plugins=[Ranked(first=value)])
    with pytest.raises(
        PluginError, match=r"'Ranked'.*'advantages' at step 1: .* NaN or infinite for 1 of 4 completions"
    ):
        trainer.train()


# -- nothing to train ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FIRST)
def test_a_run_that_trains_nothing_is_refused(tmp_path, kind):
    """With checkpointing of activations the loss has a gradient, and plain TRL finishes with healthy logs."""
    get_peft_model(tiny_model(), lora()).save_pretrained(tmp_path / "adapter")
    for plain in (True, False):
        model = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter", is_trainable=False)
        ours = {"plain": True} if plain else {"plugins": [Idle()]}
        config = {"model": model, "activation_checkpointing": True, "max_steps": 1}
        trainer = MAKE[kind](tmp_path / str(plain) / "run", **config, **ours)
        if plain:
            trainer.train()
            continue
        with pytest.raises(ConfigurationError, match=r"no parameter of the model is trainable.*is_trainable=True"):
            trainer.train()


# -- samples that are not marked -------------------------------------------------------------------------------------

WRAPPED = {"packing": True, "packing_strategy": "wrapped", "max_length": 16, "max_steps": 1}
LINE = r"packing_strategy='wrapped' cuts and joins samples.*set packing_strategy='bfd'"


@dataclass(eq=False)
class CountsSamples(Plugin):
    """The NLL, which looks at the samples of each batch."""

    counted: list[int] = field(default_factory=list)

    @hookimpl
    def per_token_loss(self, tokens):
        self.counted.append(tokens.num_samples)
        return -tokens.log_probs


@dataclass(eq=False)
class Evenly(Plugin):
    @hookimpl
    def sample_weights(self, window):
        return torch.ones(window.num_samples)


def test_wrapped_packing_is_refused_by_what_is_per_sample(tmp_path):
    for plugin in (CountsSamples(), Constant("sequence")):
        with pytest.raises(PluginError, match=LINE):
            make_sft(tmp_path, plugins=[plugin], **WRAPPED).train()
    with pytest.raises(ConfigurationError, match="plugin 'Evenly' weighs samples, but " + LINE):
        make_sft(tmp_path, plugins=[Evenly()], **WRAPPED)


def test_wrapped_packing_is_no_matter_per_token_nor_to_what_is_packed_otherwise(tmp_path):
    make_sft(tmp_path, plugins=[Nll(), Constant()], **WRAPPED).train()
    plugin = CountsSamples()
    make_sft(tmp_path, plugins=[plugin], **(WRAPPED | {"packing_strategy": "bfd", "max_length": 32})).train()
    assert plugin.counted[0] > 4
    plugin, held_out = CountsSamples(), {"eval_dataset": additions(4, seed=5)}
    make_sft(tmp_path, plugins=[plugin], trainer=held_out, **WRAPPED, eval_packing=False).evaluate()
    assert plugin.counted == [4]


# -- records are read ------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Scribbles(Plugin):
    """Edits a tensor of the record that it gets, the way that autograd allows."""

    field: str = "mask"

    def edit(self, record):
        tensor = getattr(record, self.field)
        with torch.no_grad():
            tensor.detach().zero_()


class EditsTokens(Scribbles):
    @hookimpl
    def per_token_loss(self, tokens):
        self.edit(tokens)
        return -tokens.log_probs


class EditsInputs(Plugin):
    @hookimpl
    def per_token_loss(self, tokens):
        tokens.inputs["labels"][:, :2] = -100
        return -tokens.log_probs


class EditsWindow(Plugin):
    @hookimpl
    def sample_weights(self, window):
        window.micro_batches[0]["labels"][:, :2] = -100


class EditsPolicy(Scribbles):
    @hookimpl
    def policy_loss(self, tokens):
        self.edit(tokens)
        return -tokens.log_probs


class EditsMicroStep(Scribbles):
    @hookimpl
    def auxiliary_losses(self, micro_step):
        self.edit(micro_step)
        return {}


class EditsRewards(Plugin):
    @hookimpl
    def advantages(self, advantages, rewards):
        rewards.per_function.clamp_(max=0)
        return advantages


@pytest.mark.parametrize(
    ("kind", "plugin", "place"),
    [
        ("sft", EditsTokens("mask"), "tokens.mask"),
        ("sft", EditsTokens("log_probs"), "tokens.log_probs"),
        ("sft", EditsInputs(), "tokens.inputs.labels"),
        ("sft", EditsWindow(), "window.micro_batches[0].labels"),
        ("grpo", EditsPolicy("entropy"), "tokens.entropy"),
        ("grpo", EditsMicroStep("log_probs"), "micro_step.log_probs"),
        ("grpo", EditsRewards(), "rewards.per_function"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Plugin) else None,
)
def test_an_edit_of_a_record_stops_the_run(tmp_path, kind, plugin, place):
    trainer = MAKE[kind](tmp_path / "run", plugins=[plugin])
    with pytest.raises(
        PluginError, match=rf"'{type(plugin).__name__}'.* at step 1: ValueError: edited {re.escape(place)} in place"
    ):
        trainer.train()


# -- steps that cannot be left out -----------------------------------------------------------------------------------


@pytest.mark.parametrize("plugins", [[], [Idle()]], ids=["no plugin", "plugin"])
@pytest.mark.parametrize("optim", ["galore_adamw_layerwise", "apollo_adamw_layerwise", "lomo", "adalomo"])
def test_skipping_is_refused_where_backward_updates_the_weights(tmp_path, optim, plugins):
    with pytest.raises(ConfigurationError, match=rf"nonfinite='skip' .*optim='{optim}'.*set nonfinite='raise'"):
        make_sft(tmp_path, plugins=plugins, optim=optim, nonfinite="skip")


def test_skipping_is_refused_where_a_step_without_gradients_counts(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = AdamWScheduleFree([parameter])
    optimizer.train()
    optimizer.step()
    assert optimizer.param_groups[0]["k"] == 1, "such a step leaves no trace any more; allow skipping it"
    with pytest.raises(ConfigurationError, match=r"nonfinite='skip' .*optim='schedule_free_adamw'"):
        make_sft(tmp_path, optim="schedule_free_adamw", nonfinite="skip")


def test_skipping_is_refused_under_deepspeed(tmp_path, monkeypatch):
    config = SFTConfig(str(tmp_path), **COMMON, nonfinite="skip")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigurationError, match=r"nonfinite='skip' .*DeepSpeed steps inside of its backward pass"):
        SFTTrainer(tiny_model(), config, train_dataset=additions(4), processing_class=tokenizer())
