"""What cannot work is refused before training, with the option to change; faults have a defined outcome."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from short_runs import GENERAL, TARGET, DataRegularization, model, train
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, OPTConfig
from trl_ext_data_regularization import solvers
from trl_ext_data_regularization.checks import one_pass
from trl_ext_data_regularization.gradient_surgery import GradientSurgery
from trl_ext_data_regularization.layers import Layer, find_layers
from trl_ext_data_regularization.solvers.filter import filter_negative

from trl_ext import hookimpl
from trl_ext.errors import ConfigurationError, NonFiniteError, PluginError
from trl_ext.options import check_options
from trl_ext.records import RunDescription


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"frac": 0.0}, r"frac=0.0.*\(0, 1\]"),
        ({"rule": "filter", "frac": 1.1}, r"frac=1.1.*\[0, 1\]"),
        ({"rule": "ball", "radius": -1.0}, "radius"),
        ({"stream_batch_size": 0}, "stream_batch_size"),
        ({"rule": "cone", "engine": "ghost"}, "direct or sketch"),
        ({"engine": "derivative"}, "scope=global"),
        ({"scope": "global", "passes": "one"}, "passes=one"),
        ({"general": "stream", "scope": "global"}, "scope=layer"),
        ({"general": "stream", "passes": "two"}, "general=stream"),
        ({"rule": "span", "precondition": True}, "precondition"),
        ({"general": "stream", "position_steps": 2}, "position_steps"),
        ({"position_steps": -1}, "position_steps"),
        ({"report_steps": 2}, "table=true"),
        ({"engine": "skecth"}, "engine='skecth' is not one of auto, ghost"),
        ({"frac": 0.5, "rule": "cone"}, "frac=0.5 has no effect"),
        ({"radius": 2.0}, "radius=2.0 has no effect"),
        ({"sketch_size": 8}, "sketch_size=8 has no effect"),
        ({"points": 4}, "points=4 has no effect"),
        ({"points": 3, "scope": "global", "engine": "derivative"}, "points=3 is not one of 2, 4"),
        ({"rule": "target", "with_target": True}, "leave with_target"),
    ],
)
def test_options_that_contradict_one_another(options, reason):
    with pytest.raises(ValueError, match=reason):
        check_options(DataRegularization(**options))


def description(sharding="none", world=1, streams=("target",), low_precision=(), **args):
    defaults = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "average_tokens_across_devices": True,
        "bf16_full_eval": False,
        "packing": False,
    }
    namespace = type("Args", (), {**defaults, **args})
    plugins = ("data-regularization",)
    return RunDescription(
        "sft", namespace, None, plugins, streams, (), False, world, sharding, low_precision=low_precision
    )


@pytest.mark.parametrize(
    ("options", "run", "reason"),
    [
        ({}, description("fsdp1", 2), "under fsdp1"),
        ({"scope": "global", "engine": "derivative"}, description("fsdp1", 2), "under fsdp1"),
        ({}, description("ddp", 2, average_tokens_across_devices=False), "average_tokens_across_devices=True"),
        ({"rule": "cone"}, description("ddp", 2), "engine=sketch"),
        ({"scope": "global", "engine": "derivative"}, description(low_precision=("bf16=False",)), "bf16"),
        ({"general": "stream"}, description(streams=("general", "sft")), "one stream"),
        ({}, description(per_device_train_batch_size=1), "one sample"),
        ({"unit": "micro"}, description(per_device_train_batch_size=1, gradient_accumulation_steps=8), "one sample"),
    ],
)
def test_runs_that_cannot_work(options, run, reason):
    with pytest.raises(ValueError, match=reason):
        DataRegularization(**options).check(run=run)


@pytest.mark.parametrize(
    ("options", "run"),
    [
        ({"rule": "filter"}, description(per_device_train_batch_size=1)),
        ({}, description(per_device_train_batch_size=1, gradient_accumulation_steps=8)),
        ({"rule": "cone", "engine": "sketch"}, description("ddp", 2)),
        ({"scope": "global", "engine": "derivative"}, description("fsdp2", 2)),
        ({"rule": "ball", "engine": "sketch", "radius": 2.0}, description("fsdp2", 2)),
        ({"rule": "cone", "unit": "micro"}, description("fsdp2", 2)),
        ({"general": "stream"}, description("fsdp2", 2, streams=("general",))),
        ({}, description("fsdp2", 2, low_precision=("bf16=False",))),
    ],
)
def test_runs_that_can(options, run):
    DataRegularization(**options).check(run=run)


# -- advice: what a refusal says to do leads to a run that is not refused ----------------------------------------------

FSDP1 = {"sharding": "fsdp1", "world": 2}
FSDP2 = {"sharding": "fsdp2", "world": 2}
DDP = {"sharding": "ddp", "world": 2}
DERIVATIVE = {"scope": "global", "engine": "derivative"}
STREAM = {"general": "stream"}
# The options and the run that are refused, words of the refusal, and what they mean to change of options and run.
ADVICE = [
    ({"radius": 2.0}, {}, "set rule=ball", {"rule": "ball"}, {}),
    ({"radius": 2.0}, {}, "leave it", {"radius": 1.0}, {}),
    ({"points": 4}, {}, "set scope=global,engine=derivative", DERIVATIVE, {}),
    ({"sketch_size": 8}, {}, "set engine=sketch", {"engine": "sketch"}, {}),
    ({"rule": "ball", "with_target": True}, {}, "leave with_target", {"with_target": False}, {}),
    ({"rule": "cone", "engine": "ghost"}, {}, "use engine=direct or sketch", {"engine": "direct"}, {}),
    ({"rule": "hull", **DERIVATIVE}, {}, "use engine=direct or sketch", {"engine": "sketch"}, {}),
    ({"rule": "cone", "precondition": True}, {}, "rule=topk and rule=filter", {"rule": "filter"}, {}),
    ({"engine": "derivative"}, {}, "set scope=global", {"scope": "global"}, {}),
    ({"engine": "derivative", **STREAM}, {}, "scope=layer,engine=ghost", {"engine": "ghost"}, {}),
    ({**DERIVATIVE, **STREAM}, {}, "general=train", {"general": "train"}, {}),
    ({"scope": "global", **STREAM}, {}, "use scope=layer", {"scope": "layer"}, {}),
    ({"position_steps": 2, **STREAM}, {}, "leave it", {"position_steps": 0}, {}),
    ({"passes": "two", **STREAM}, {}, "leave passes", {"passes": "auto"}, {}),
    ({"scope": "global", "passes": "one"}, {}, "set passes=auto", {"passes": "auto"}, {}),
    ({**DERIVATIVE, "passes": "one"}, {}, "set passes=auto", {"passes": "auto"}, {}),
    ({"report_steps": 2}, {}, "set table=true", {"table": True}, {}),
    ({}, FSDP1, "use FSDP2 or DDP", {}, FSDP2),
    ({}, FSDP1, "or DDP", {}, DDP),
    (DERIVATIVE, {**FSDP2, "low_precision": ("bf16=False",)}, "set bf16=False", {}, {"low_precision": ()}),
    (DERIVATIVE, {**FSDP2, "bf16_full_eval": True}, "set bf16_full_eval=False", {}, {"bf16_full_eval": False}),
    (DERIVATIVE, {**FSDP2, "low_precision": ("bf16=False",)}, "or use engine=ghost", {"engine": "ghost"}, {}),
    (DERIVATIVE, {"low_precision": ("bf16=False",)}, "or use engine=ghost", {"engine": "ghost"}, {}),
    ({"rule": "cone"}, FSDP2, "use engine=sketch", {"engine": "sketch"}, {}),
    ({"rule": "cone"}, FSDP2, "or unit=micro", {"unit": "micro"}, {}),
    ({}, {**DDP, "average_tokens_across_devices": False}, "=True", {}, {"average_tokens_across_devices": True}),
    ({"rule": "cone"}, DDP, "use engine=sketch", {"engine": "sketch"}, {}),
    ({"rule": "cone"}, DDP, "or unit=micro", {"unit": "micro"}, {}),
    (STREAM, {"streams": ("general", "sft")}, "the one stream 'general'", {}, {"streams": ("general",)}),
    ({}, {"per_device_train_batch_size": 1}, "or gradient_accumulation_steps", {}, {"gradient_accumulation_steps": 2}),
    ({}, {"per_device_train_batch_size": 1}, "rule=filter", {"rule": "filter"}, {}),
    (
        {"unit": "micro"},
        {"per_device_train_batch_size": 1},
        "raise per_device_train_batch_size, or",
        {},
        {"per_device_train_batch_size": 2},
    ),
    (
        {"stream_batch_size": 1, **STREAM},
        {"streams": ("general",)},
        "raise stream_batch_size",
        {"stream_batch_size": 2},
        {},
    ),
]


def checked(options, run):
    """What start-up checks, in its order."""
    plugin = DataRegularization(**options)
    check_options(plugin)
    if plugin.general == "stream":
        run = {"streams": ("general",), **run}
    plugin.check(run=description(**run))


@pytest.mark.parametrize(("options", "run", "advice", "other_options", "other_run"), ADVICE)
def test_a_refusals_advice_is_accepted(options, run, advice, other_options, other_run):
    with pytest.raises(ValueError, match=re.escape(advice)):
        checked(options, run)
    checked({**options, **other_options}, {**run, **other_run})


@pytest.mark.parametrize(
    ("options", "run", "uses", "advice", "other_options", "other_run", "other_uses"),
    [
        ({"passes": "one"}, {"gradient_accumulation_steps": 2}, 1, "set passes=auto", {"passes": "auto"}, {}, 1),
        ({"passes": "one"}, {"world_size": 2}, 1, "or unit=micro", {"unit": "micro"}, {}, 1),
        ({"passes": "one"}, {}, 2, "Freeze it", {}, {}, 1),
        ({"passes": "one"}, {}, 2, "set passes=two", {"passes": "two"}, {}, 2),
        (STREAM, {}, 2, "set passes=two and general=train", {"passes": "two", "general": "train"}, {}, 2),
    ],
)
def test_advice_on_passes_is_accepted(options, run, uses, advice, other_options, other_run, other_uses):
    def chosen(options, run, uses):
        context = SimpleNamespace(**{"gradient_accumulation_steps": 1, "world_size": 1, **run})
        return one_pass(DataRegularization(**options)._plan, [Layer("tied", 0, None, uses)], context)

    with pytest.raises(ValueError, match=advice):
        chosen(options, run, uses)
    chosen({**options, **other_options}, {**run, **other_run}, other_uses)


def test_advice_on_layers_that_cannot_be_tapped_is_accepted():
    """A parameter of no layer: freeze it, or choose globally with forward passes alone."""
    net = model(layers=1)
    net.model.steering = nn.Parameter(torch.zeros(16))
    with pytest.raises(PluginError, match="scope=global,engine=derivative"):
        train(DataRegularization(), net, max_steps=1)
    train(DataRegularization(**DERIVATIVE), net, max_steps=1)
    net.model.steering.requires_grad_(False)
    train(DataRegularization(), net, max_steps=1)


def test_advice_on_weights_in_low_precision_is_accepted():
    net = model(layers=1).bfloat16()
    with pytest.raises(PluginError, match=r"load the model in fp32, or use engine=ghost"):
        train(DataRegularization(**DERIVATIVE), net, max_steps=1)
    train(DataRegularization(scope="global", engine="ghost"), net, max_steps=1)
    train(DataRegularization(**DERIVATIVE), net.float(), max_steps=1)


def test_weights_in_low_precision_below_an_adapter_are_refused():
    """The adapter that trains is in fp32, and the losses are of the whole model."""
    net, adapter = model(layers=1).bfloat16(), LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(PluginError, match="weights in fp32, those below an adapter too; load the model in fp32"):
        train(DataRegularization(**DERIVATIVE), net, peft_config=adapter, max_steps=1)
    trainer = train(DataRegularization(**DERIVATIVE), net.float(), peft_config=adapter, max_steps=1)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_two_plugins_that_combine_the_target_with_general_data_exclude_each_other():
    for plugin in (DataRegularization, GradientSurgery):
        (word,) = plugin.provides
        assert {word} == plugin.conflicts.keys() == set(DataRegularization.provides)


def test_deepspeed_is_refused_by_the_core(tmp_path):
    config = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 4}
    with pytest.raises((ConfigurationError, ImportError), match=r"(?i)deepspeed"):
        train(DataRegularization(), deepspeed=config)


def test_a_parameter_of_no_layer_is_named():
    net = model(layers=1)
    net.model.steering = nn.Parameter(torch.zeros(16))
    with pytest.raises(ConfigurationError, match=r"model\.steering.*engine=derivative"):
        find_layers(net, [name for name, _ in net.named_parameters()])


def test_one_pass_over_a_longer_window_is_refused():
    with pytest.raises(PluginError, match="passes=auto"):
        train(DataRegularization(passes="one"), gradient_accumulation_steps=2)


def test_a_missing_target_names_the_line_to_add():
    with pytest.raises(ConfigurationError, match=r"streams.*target"):
        train(DataRegularization(), streams={})


# -- faults ----------------------------------------------------------------------------------------------------------


def test_when_every_weight_is_zero_the_update_is_zero(monkeypatch):
    """`filter` may drop all; then SGD stays where it is."""
    opposed = lambda problem, frac: filter_negative(replace(problem, s=-torch.ones_like(problem.s)), frac)  # noqa: E731
    monkeypatch.setattr(solvers, "filter_negative", opposed)
    net = model(layers=1)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    trainer = train(DataRegularization(rule="filter", scope="global"), net, optim="sgd", max_steps=2)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, start[name]), name
    assert all(log["loss"] == 0.0 for log in trainer.state.log_history if "loss" in log)


class NanTarget:
    """An objective that has no finite gradient on the target."""

    requires_api = "1"
    trainers = ("sft",)

    @hookimpl
    def per_token_loss(self, tokens):
        return -tokens.log_probs * (float("nan") if tokens.stream == "target" else 1.0)


NOT_FINITE = {
    "one pass": {},
    "two passes": {"passes": "two"},
    "filter": {"rule": "filter", "passes": "two"},
    "global": {"scope": "global"},
    "derivative": {"scope": "global", "engine": "derivative"},
    "cone": {"rule": "cone"},
    "sketched span": {"rule": "span", "engine": "sketch", "scope": "global"},
    "ball": {"rule": "ball"},
}


@pytest.mark.parametrize("case", NOT_FINITE)
def test_a_target_gradient_of_nan_stops_the_run(case, caplog):
    """No order of NaN says which samples to keep, so none of them is trained on."""
    net, start = model(layers=1), model(layers=1).state_dict()
    net.register_forward_hook(lambda module, args, output: seen.append(module))
    seen: list[nn.Module] = []
    with pytest.raises(NonFiniteError, match=r"step 1, .* data-regularization"):
        train(DataRegularization(**NOT_FINITE[case]), net, beside=[NanTarget()], nonfinite="raise")
    assert "the scores <g_i, t> are NaN or infinite" in caplog.text
    for name, value in seen[-1].state_dict().items():
        assert torch.equal(value, start[name]), name


@pytest.mark.parametrize("options", [{}, {"scope": "global", "rule": "cone"}])
def test_steps_with_a_target_gradient_of_nan_can_be_left_out(options):
    """The model stays as it was, and what is counted and logged knows nothing of such steps."""
    plugin = DataRegularization(table=True, **options)
    trainer = train(plugin, beside=[NanTarget()], nonfinite="skip", max_steps=2)
    for name, value in model().state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], value), name
    assert plugin.recorder.seen == {}
    logged = [key for log in trainer.state.log_history for key in log if key.startswith("data-regularization/kept")]
    assert logged == []


def test_a_target_smaller_than_its_batch_cycles_within_it():
    """Three samples, eight a step: every sample comes two or three times, and training goes on."""
    trainer = train(DataRegularization(stream_batch_size=8), streams={"target": TARGET.select(range(3))}, max_steps=2)
    stream = trainer.ext_streams["target"]
    assert stream.position == 16
    stream.position = 0
    drawn = stream.next_indices()
    assert all(drawn.count(i) in (2, 3) for i in range(3))


def test_an_exhausted_target_begins_again_in_another_order():
    """Six samples, one a step: two passes over all of them, shuffled anew."""
    trainer = train(DataRegularization(), max_steps=12)
    stream = trainer.ext_streams["target"]
    assert stream.position == 12
    stream.position = 0
    drawn = [stream.next_indices()[0] for _ in range(12)]
    assert sorted(drawn[:6]) == sorted(drawn[6:]) == list(range(6))
    assert drawn[:6] != drawn[6:]


def test_the_targets_length_is_bounded_alone():
    trainer = train(DataRegularization(stream_max_length=6), max_steps=1)
    assert max(len(row["input_ids"]) for row in trainer.ext_streams["target"].dataset) == 6
    assert max(len(row["input_ids"]) for row in trainer.train_dataset) > 6


UNTOUCHED = {
    "ghost, one pass": {},
    "ghost, two passes": {"passes": "two"},
    "direct": {"rule": "cone"},
    "direct, two passes": {"rule": "cone", "passes": "two"},
    "sketch": {"engine": "sketch", "passes": "two"},
    "global": {"scope": "global"},
    "derivative": {"scope": "global", "engine": "derivative"},
    "target": {"rule": "target"},
    "position": {"position_steps": 1},
}


@pytest.mark.parametrize("case", UNTOUCHED)
def test_a_trainable_parameter_that_the_forward_leaves_out_stays_and_disturbs_nothing(case):
    options = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 2}
    without = train(DataRegularization(**UNTOUCHED[case]), model(layers=1), **options)
    net = model(layers=1)
    net.model.spare = nn.Linear(16, 8)
    before = {name: p.detach().clone() for name, p in net.model.spare.named_parameters()}
    trainer = train(DataRegularization(**UNTOUCHED[case]), net, **options)
    for name, parameter in trainer.model.model.spare.named_parameters():
        assert torch.equal(parameter, before[name]), name
    found = dict(trainer.model.named_parameters())
    for name, parameter in without.model.named_parameters():
        torch.testing.assert_close(found[name], parameter, rtol=0, atol=1e-6)


def test_one_sample_is_kept_or_dropped_by_filter():
    trainer = train(DataRegularization(rule="filter"), data=GENERAL, per_device_train_batch_size=1, max_steps=2)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


class PastTheHead:
    """A loss of the hidden states, without the head's log-probabilities."""

    requires_api = "1"

    @hookimpl
    def setup(self, context):
        context.model.base_model.register_forward_hook(self.keep)

    def keep(self, module, args, output):
        self.hidden = output.last_hidden_state

    @hookimpl
    def per_token_loss(self, tokens):
        return self.hidden[:, :-1].square().mean(-1)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_loss_that_goes_past_the_scored_head_is_refused_and_the_advice_works(scope):
    with pytest.raises((PluginError, RuntimeError), match=r"the loss goes past them .*; freeze it"):
        train(DataRegularization(scope=scope), beside=[PastTheHead()])
    derivative = DataRegularization(scope="global", engine="derivative", rule="topk", general="train")
    frozen = model()
    frozen.lm_head.requires_grad_(False)
    for plugin, net in ((derivative, None), (DataRegularization(scope=scope), frozen)):
        assert train(plugin, net, beside=[PastTheHead()]).state.global_step == 3


@pytest.mark.parametrize("architecture", ["gemma", "opt"])
def test_modules_that_do_more_than_torchs_own_are_refused(architecture):
    """Gemma's embedding scales, OPT's positions take an offset: a tap for torch's own would train another net."""
    small = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if architecture == "gemma":
        config = Gemma2Config(**small, head_dim=8, num_key_value_heads=2, intermediate_size=32)
    else:
        config = OPTConfig(**small, ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=32)
    net = AutoModelForCausalLM.from_config(config)
    names = [name for name, _ in net.named_parameters()]
    expected = "embed_tokens" if architecture == "gemma" else "embed_positions"
    with pytest.raises(ConfigurationError, match=f"or norm of torch's own kind .*{expected}"):
        find_layers(net, names)
