"""What cannot work is refused before training, with the option to change; faults have a defined outcome."""

import pytest
import torch
from torch import nn
from training import GENERAL, TARGET, DataRegularization, model, train
from trl_ext_data_regularization.layers import find_layers

from trl_ext.errors import ConfigurationError, PluginError
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
    ],
)
def test_options_that_contradict_one_another(options, reason):
    with pytest.raises(ValueError, match=reason):
        DataRegularization(**options)


def description(sharding="none", world=1, streams=("target",), **args):
    defaults = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "average_tokens_across_devices": True,
        "bf16": False,
        "packing": False,
    }
    namespace = type("Args", (), {**defaults, **args})
    return RunDescription("sft", namespace, None, ("data-regularization",), streams, (), False, world, sharding)


@pytest.mark.parametrize(
    ("options", "run", "reason"),
    [
        ({}, description("fsdp2", 2), "use DDP"),
        ({}, description("ddp", 2, average_tokens_across_devices=False), "average_tokens_across_devices=True"),
        ({"rule": "cone"}, description("ddp", 2), "engine=sketch"),
        ({"scope": "global", "engine": "derivative"}, description(bf16=True), "bf16"),
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
    ],
)
def test_runs_that_can(options, run):
    DataRegularization(**options).check(run=run)


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


def test_when_every_weight_is_zero_the_update_is_zero():
    """`filter` may drop all; then SGD stays where it is."""
    net = model(layers=1)
    plugin = DataRegularization(rule="filter", scope="global")
    start = {name: p.detach().clone() for name, p in net.named_parameters()}

    def drop_all(problem, norms, lr):
        from trl_ext_data_regularization.solvers import Problem, Rule

        return Rule("filter", 1.0).solve(Problem(-torch.ones_like(problem.s), problem.tokens), norms, lr)

    plugin._rule = type("Opposed", (), {"solve": staticmethod(drop_all), "name": "filter", "needs_gram": False})()
    trainer = train(plugin, net, optim="sgd", max_steps=2)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, start[name]), name
    assert all(log["loss"] == 0.0 for log in trainer.state.log_history if "loss" in log)


def test_a_target_smaller_than_its_batch_cycles_within_it():
    """Three samples, eight a step: every sample comes two or three times, and training goes on."""
    trainer = train(DataRegularization(stream_batch_size=8), streams={"target": TARGET.select(range(3))}, max_steps=2)
    stream = trainer.ext_streams["target"]
    assert stream.position == 16
    stream.position = 0
    drawn = stream.next_indices()
    assert all(drawn.count(i) in (2, 3) for i in range(3))


def test_one_sample_is_kept_or_dropped_by_filter():
    trainer = train(DataRegularization(rule="filter"), data=GENERAL, per_device_train_batch_size=1, max_steps=2)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


# -- diagnostics -----------------------------------------------------------------------------------------------------


def test_table_plot_and_metrics(tmp_path):
    plugin = DataRegularization(rule="hull", table=True, report_steps=2)
    trainer = train(plugin, max_steps=4, output_dir=str(tmp_path))
    logs = [log for log in trainer.state.log_history if "data-regularization/kept" in log]
    for log in logs:
        assert 0 < log["data-regularization/kept"] <= 1
        assert "data-regularization/kept/q_proj" in log
    rows = plugin.recorder.table(rows=3)
    assert sum(one.times for one in plugin.recorder.seen.values()) == 16
    assert all(0 <= row["kept"] <= 1 for row in rows)
    assert [row["kept"] for row in rows] == sorted((row["kept"] for row in rows), reverse=True)
    assert rows[0]["text"].rstrip("<>|/eos ")[:1].isdigit()
    assert (tmp_path / "data_regularization.csv").read_text().startswith("id,seen,kept,weight,text")
    assert (tmp_path / "data_regularization.png").stat().st_size > 1000
    assert len(plugin.recorder.history) == 4


def test_position_runs_from_full_training_to_target_only():
    found = {}
    for radius in (0.0, 0.5, 1e4):
        plugin = DataRegularization(rule="ball", radius=radius, passes="two")
        trainer = train(plugin, max_steps=1)
        (log,) = [log for log in trainer.state.log_history if "data-regularization/position" in log]
        found[radius] = log["data-regularization/position"]
        assert -1 <= log["data-regularization/cosine"] <= 1
    assert found[0.0] == pytest.approx(0, abs=1e-4)  # a root of rounding
    assert 0.05 < found[0.5] < 0.95
    assert found[1e4] == pytest.approx(1, abs=1e-4)
