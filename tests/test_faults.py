"""Plugins that misbehave, and combinations that are refused before training."""

from __future__ import annotations

import logging
import sys
import types
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from helpers import FIRST, Idle, Nll, Plugin, assert_equal_bits

from trl_ext import SFTConfig, SFTTrainer, hookimpl
from trl_ext.errors import ConfigurationError, PluginError
from trl_ext.records import AuxiliaryLoss, StreamRequest
from trl_ext.testing.runs import COMMON, MAKE, additions, logged, make_grpo, make_sft, parameters, tiny_model, tokenizer

# -- hooks that raise ------------------------------------------------------------------------------------------------


class Boom(Exception):
    pass


def raising(hook: str, at: int = 0) -> Any:
    """A plugin whose hook raises at its call number `at`, counted from 0, and does nothing before that."""
    neutral = {
        "per_token_loss": lambda tokens: -tokens.log_probs,
        "policy_loss": lambda tokens: -tokens.log_probs * tokens.advantages,
        "advantages": lambda advantages: advantages,
        "wrap_optimizer": lambda optimizer: optimizer,
        "auxiliary_losses": lambda: {},
    }.get(hook)
    names = {
        "per_token_loss": "tokens",
        "policy_loss": "tokens",
        "advantages": "advantages",
        "wrap_optimizer": "optimizer",
    }
    argument = names.get(hook)

    def body(self: Any, *args: Any) -> Any:
        self.calls += 1
        if self.calls == at + 1:
            raise Boom("kaputt")
        return neutral(*args) if neutral else None

    if argument == "tokens":

        def method(self, tokens):
            return body(self, tokens)
    elif argument == "advantages":

        def method(self, advantages):
            return body(self, advantages)
    elif argument == "optimizer":

        def method(self, optimizer):
            return body(self, optimizer)
    else:

        def method(self):
            return body(self)

    return type("Faulty", (Plugin,), {hook: hookimpl(method), "calls": 0})()


FATAL = {
    "sft": [
        "setup",
        "sample_weights",
        "per_token_loss",
        "auxiliary_losses",
        "gradients_ready",
        "wrap_optimizer",
        "weights_updated",
    ],
    "grpo": ["setup", "advantages", "policy_loss", "auxiliary_losses", "gradients_ready", "weights_updated"],
    "dpo": ["auxiliary_losses", "gradients_ready"],
    "rloo": ["advantages", "policy_loss"],
    "reward": ["gradients_ready", "weights_updated"],
}


@pytest.mark.parametrize(("kind", "hook"), [(kind, hook) for kind, hooks in FATAL.items() for hook in hooks])
def test_a_hook_that_raises_stops_the_run_and_is_named(tmp_path, kind, hook):
    at = 0 if hook in ("setup", "wrap_optimizer") else 1  # one call a step in these runs, so step 2
    plugin = raising(hook, at)
    trainer = MAKE[kind](tmp_path / "run", plugins=[Idle(), plugin])
    match = rf"plugin 'Faulty' \(class Faulty of .*\) failed in hook '{hook}' at step {at + 1}: Boom: kaputt"
    with pytest.raises(PluginError, match=match) as caught:
        trainer.train()
    assert isinstance(caught.value.__cause__, Boom)


UNTRAINABLE = {
    "detached": (lambda loss: loss.detach(), "returned a loss that is detached from the model"),
    "integer": (lambda loss: loss.long(), "returned a loss of torch.int64; compute it in a floating-point dtype"),
}


@pytest.mark.parametrize("fault", UNTRAINABLE)
@pytest.mark.parametrize("hook", ["per_token_loss", "policy_loss", "auxiliary_losses"])
def test_a_loss_that_nothing_can_be_trained_on_is_named(tmp_path, hook, fault):
    spoil, message = UNTRAINABLE[fault]

    class PerToken(Plugin):
        @hookimpl
        def per_token_loss(self, tokens):
            return spoil(-tokens.log_probs)

    class Policy(Plugin):
        @hookimpl
        def policy_loss(self, tokens):
            return spoil(-tokens.log_probs * tokens.advantages)

    class Term(Plugin):
        @hookimpl
        def auxiliary_losses(self, micro_step):
            return {"term": AuxiliaryLoss(spoil(micro_step.log_probs.sum()), "token")}

    plugin = {"per_token_loss": PerToken, "policy_loss": Policy, "auxiliary_losses": Term}[hook]()
    trainer = MAKE["grpo" if hook == "policy_loss" else "sft"](tmp_path / "run", plugins=[plugin])
    with pytest.raises(PluginError, match=f"failed in hook '{hook}' at step 1: TypeError: {message}"):
        trainer.train()


def test_deployed_weights_that_raise_stop_the_evaluation(tmp_path):
    plugin = raising("deployed_weights")
    config = {"eval_strategy": "steps", "eval_steps": 2, "trainer": {"eval_dataset": additions(4)}}
    trainer = make_sft(tmp_path, plugins=[plugin], **config)
    with pytest.raises(PluginError, match=r"'Faulty'.*hook 'deployed_weights'"):
        trainer.train()


@pytest.mark.parametrize("hook", ["check", "streams"])
def test_a_start_up_hook_that_raises_is_named(tmp_path, hook):
    with pytest.raises((ConfigurationError, PluginError), match=r"'Faulty'.*kaputt"):
        make_sft(tmp_path, model="no/such/model", plugins=[raising(hook)])


@pytest.mark.parametrize("kind", FIRST)
def test_a_diagnostic_that_raises_is_logged_once_and_the_training_goes_on(tmp_path, caplog, kind):
    """The bytes of the training are those of a run without it; the other plugin's metrics stay."""

    @dataclass(eq=False)
    class Breaks(Plugin):
        calls: int = 0

        @hookimpl
        def metrics(self, mode):
            self.calls += 1
            if self.calls == 2:
                raise Boom("no such number")
            return {"value": self.calls}

    @dataclass(eq=False)
    class Counts(Plugin):
        calls: int = 0

        @hookimpl
        def metrics(self, mode):
            self.calls += 1
            return {"calls": self.calls}

    plain = MAKE[kind](tmp_path / "a" / "run", plain=True)
    plain.train()
    breaks, counts = Breaks(), Counts()
    ours = MAKE[kind](tmp_path / "b" / "run", plugins=[breaks, counts])
    with caplog.at_level(logging.ERROR, logger="trl_ext"):
        ours.train()
    assert_equal_bits(parameters(ours), parameters(plain))
    assert breaks.calls == 2
    steps = [entry for entry in logged(ours) if "learning_rate" in entry]
    assert [entry.get("Breaks/value") for entry in steps] == [1, None, None, None]
    assert [entry["Counts/calls"] for entry in steps] == [1, 2, 3, 4]
    complaints = [record for record in caplog.records if "'Breaks'" in record.getMessage()]
    assert len(complaints) == 1
    assert "hook 'metrics' at step" in complaints[0].getMessage()
    assert "no such number" in str(complaints[0].exc_info[1])


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (lambda tokens: tokens.log_probs.mean(), r"\(\)"),
        (lambda tokens: tokens.log_probs[:, :-1], r"\(4, \d+\)"),
        (lambda tokens: None, "NoneType"),
        (lambda tokens: 1.0, "float"),
    ],
    ids=["mean", "short", "none", "float"],
)
def test_a_loss_of_another_shape_is_refused(tmp_path, value, got):
    @dataclass(eq=False)
    class Odd(Plugin):
        @hookimpl
        def per_token_loss(self, tokens):
            return value(tokens)

    trainer = make_sft(tmp_path, plugins=[Odd()])
    with pytest.raises(PluginError, match=rf"'Odd'.*'per_token_loss' at step 1: TypeError: returned {got}; expected"):
        trainer.train()


def test_metrics_carry_the_plugins_name_and_may_not_clash(tmp_path):
    @dataclass(eq=False)
    class Counts(Plugin):
        label: str = ""
        value: float = 0.0

        @hookimpl
        def metrics(self, mode):
            return {"loss": self.value}

    trainer = make_sft(tmp_path, plugins=[Counts("one", 1.0), Counts("two", 2.0)], max_steps=1)
    trainer.train()
    entry = logged(trainer)[0]
    assert entry["one/loss"] == 1.0
    assert entry["two/loss"] == 2.0
    assert entry["loss"] > 2


# -- refused at start-up ---------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Edits(Plugin):
    @hookimpl
    def gradients_ready(self, gradients):
        gradients.mul_(1.0)


@dataclass(eq=False)
class Weighs(Plugin):
    @hookimpl
    def sample_weights(self, window):
        return torch.ones(window.num_samples)


@dataclass(eq=False)
class Wants(Plugin):
    optional: bool = False
    label: str = ""
    batch_size: int = 8

    @hookimpl
    def streams(self):
        return [StreamRequest("general", optional=self.optional, batch_size=self.batch_size)]


def loss_func(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return outputs.logits.sum()


REFUSED: dict[str, tuple[str, list[Plugin], dict[str, Any], str]] = {
    "dft beside an objective": (
        "sft",
        [Nll()],
        {"loss_type": "dft"},
        "'Nll' owns .*loss_type='dft'.*set loss_type='nll'",
    ),
    "compute_loss_func": (
        "sft",
        [Nll()],
        {"trainer": {"compute_loss_func": loss_func}},
        "compute_loss_func bypasses .*'Nll'",
    ),
    "compute_loss_func and weights": (
        "sft",
        [Weighs()],
        {"trainer": {"compute_loss_func": loss_func}},
        "compute_loss_func bypasses plugin 'Weighs'",
    ),
    "label smoothing": (
        "sft",
        [Nll()],
        {"label_smoothing_factor": 0.1},
        "label_smoothing_factor=0.1 .*'Nll'; set it to 0",
    ),
    "auto_find_batch_size": (
        "sft",
        [Idle()],
        {"auto_find_batch_size": True},
        "auto_find_batch_size=True .*set the batch size",
    ),
    "no data for a stream": ("sft", [Wants()], {}, "'Wants' needs .*role 'general' .given: none.; add `streams:"),
    "no data for a stream, GRPO": ("grpo", [Wants()], {}, "'Wants' needs .*role 'general'"),
    "data that nobody reads": (
        "sft",
        [Idle()],
        {"streams": {"general": additions(4)}},
        r"no active plugin uses .*general",
    ),
    "data under another name": (
        "sft",
        [Wants()],
        {"streams": {"generall": additions(4)}},
        r"role 'general' \(given: generall\)",
    ),
    "one stream in two ways": (
        "sft",
        [Wants(label="a"), Wants(label="b", batch_size=2)],
        {"streams": {"general": additions(8)}},
        "two plugins ask for the stream 'general' in different ways",
    ),
    "an objective without supervised data": (
        "grpo",
        [Nll()],
        {},
        "'Nll' owns the loss per token of supervised data, and this GRPO run has none: give",
    ),
    "a stream with images": (
        "sft",
        [Wants()],
        {"streams": {"general": additions(4).add_column("images", [[]] * 4)}},
        "stream 'general' has a column 'images', but streams are of text",
    ),
    "an empty stream": ("sft", [Wants()], {"streams": {"general": additions(4).select([])}}, "stream 'general'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_at_start_up(tmp_path, case):
    kind, plugins, config, message = REFUSED[case]
    with pytest.raises(ConfigurationError, match=message):
        MAKE[kind](tmp_path / "run", plugins=plugins, **config)


@pytest.mark.parametrize("plugin", [Edits(), Weighs(), Wants()], ids=["gradients", "weights", "streams"])
def test_fp16_is_refused_where_gradients_are_seen(tmp_path, monkeypatch, plugin):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    config = SFTConfig(str(tmp_path), **COMMON)
    streams = {"general": additions(8)} if isinstance(plugin, Wants) else None
    with pytest.raises(ConfigurationError, match="gradients scaled for fp16; set bf16=True and fp16=False"):
        SFTTrainer(tiny_model(), config, train_dataset=additions(4), plugins=[plugin], streams=streams)


def test_streams_without_any_plugin_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"no active plugin uses the stream.*general"):
        make_sft(tmp_path, streams={"general": additions(4)})


def test_an_optional_stream_may_be_missing(tmp_path):
    trainer = make_sft(tmp_path, plugins=[Wants(optional=True)], max_steps=1)
    trainer.train()
    assert trainer.ext_streams == {}


def test_two_plugins_may_share_a_stream(tmp_path):
    data = {"general": additions(16)}
    trainer = make_sft(tmp_path, plugins=[Wants(label="a"), Wants(label="b")], streams=data, max_steps=2)
    trainer.train()
    assert trainer.ext_streams["general"].position == 16


def test_parallelism_is_refused(tmp_path):
    config = SFTConfig(str(tmp_path), bf16=False, use_cpu=True)
    config.parallelism_config = ParallelismConfig(tp_size=2)
    with pytest.raises(ConfigurationError, match=r"parallelism_config with tp_size=2 .*nothing but dp_replicate_size"):
        SFTTrainer(tiny_model(), config, train_dataset=additions(4), plugins=[Idle()])


def test_several_gpus_in_one_process_are_refused(tmp_path):
    config = SFTConfig(str(tmp_path), **COMMON)
    config._n_gpu = 2
    with pytest.raises(ConfigurationError, match=r"nn.DataParallel over 2 GPUs .*torchrun"):
        SFTTrainer(tiny_model(), config, train_dataset=additions(4), processing_class=tokenizer(), plugins=[Idle()])


def test_unsloth_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "unsloth", types.ModuleType("unsloth"))
    with pytest.raises(ConfigurationError, match="unsloth rewrites TRL's trainers"):
        make_sft(tmp_path, plugins=[Idle()])
    make_sft(tmp_path)


@pytest.mark.parametrize("outputs", [("logits",), ("mean_logits", "variance")])
def test_unknown_fused_outputs_are_refused(tmp_path, outputs):
    plugin = Nll()
    plugin.fused_outputs = outputs
    with pytest.raises(ConfigurationError, match=r"fused_outputs .*the head offers log_sum_sq_probs, mean_logits"):
        make_sft(tmp_path, plugins=[plugin])


@pytest.mark.parametrize(
    ("launcher", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "does not work under DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "does not work under FSDP1"),
    ],
    ids=["deepspeed", "fsdp1"],
)
def test_sharding_that_hides_gradients_is_refused(tmp_path, monkeypatch, launcher, message):
    config = SFTConfig(str(tmp_path), **COMMON)
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=f"hook 'gradients_ready' of plugin 'Edits' {message}"):
        SFTTrainer(tiny_model(), config, train_dataset=additions(4), processing_class=tokenizer(), plugins=[Edits()])


def test_each_hook_is_only_for_its_trainer(tmp_path):
    with pytest.raises(ConfigurationError, match="sample_weights"):
        make_grpo(tmp_path / "run", plugins=[Weighs()])


@dataclass(eq=False)
class KeepsNothing(Plugin):
    kept: list[int] = field(default_factory=list)


def test_a_plugin_without_hooks_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="KeepsNothing"):
        make_sft(tmp_path, plugins=[KeepsNothing()])
