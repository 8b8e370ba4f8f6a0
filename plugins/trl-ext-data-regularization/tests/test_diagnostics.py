"""Diagnostics against their definitions, in the run folder, and over a resume."""

import csv

import pytest
import torch
from short_runs import GENERAL, TARGET, TOKENIZER, DataRegularization, model, parameters, train
from test_sft import SGD, Reference, layers_of, sharpened
from trl_ext_data_regularization import kept_report
from trl_ext_data_regularization.diagnostics import sample_id
from trl_ext_data_regularization.layers import find_layers

FEW = {"data": GENERAL.select(range(8)), "streams": {"target": TARGET.select([0])}}


@pytest.fixture(scope="module")
def reference():
    """The gradients of 8 general samples and of one target sample, by autograd on each alone."""
    trainer = train(DataRegularization(rule="full"), **FEW, max_steps=1)
    net = sharpened(model(layers=1))
    return net, Reference(net, list(trainer.train_dataset), list(trainer.ext_streams["target"].dataset))


def logged(trainer):
    (log,) = [log for log in trainer.state.log_history if "data-regularization/kept" in log]
    prefix = "data-regularization/"
    return {name.removeprefix(prefix): value for name, value in log.items() if name.startswith(prefix)}


def flat(gradients, names):
    return torch.cat([gradients[name].flatten() for name in names])


def expected_angles(reference, update, names):
    g = sum(flat(sample, names) for sample in reference.g)
    t, u = flat(reference.t, names), flat(update, names)
    near, far = float((u - g).norm()), float((u - t).norm())
    return float(torch.cosine_similarity(g, t, 0)), near / (near + far)


# -- angles ----------------------------------------------------------------------------------------------------------

WITH_GRAM = {"engine": "direct"}
ANGLES = {
    "ghost, asked for": (1, {"position_steps": 1}),
    "ghost, asked for, accumulated": (2, {"position_steps": 1}),
    "direct, one pass": (1, WITH_GRAM),
    "direct, two passes": (2, WITH_GRAM),
    "wide sketch": (1, {"engine": "sketch", "sketch_size": 512}),
}


@pytest.mark.parametrize("case", ANGLES)
def test_cosine_and_position_are_those_of_the_gradients(reference, case):
    """Over all layers and by type, for layer-wise top-k."""
    accumulation, options = ANGLES[case]
    net, right = reference
    groups = layers_of(net)
    update = right.topk(groups, 4)
    size = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    found = logged(train(DataRegularization(frac=0.5, **options), net, **FEW, **SGD, **size))
    by_type = {"": [name for names in groups for name in names]}
    layers = find_layers(net, [name for name, _ in net.named_parameters()])[0]
    for layer, names in zip(layers, groups, strict=True):
        by_type.setdefault(f"/{layer.type}", []).extend(names)
    assert {"/q_proj", "/embed_tokens", "/norm"} <= by_type.keys()
    for suffix, names in by_type.items():
        cosine, position = expected_angles(right, update, names)
        assert found[f"cosine{suffix}"] == pytest.approx(cosine, abs=1e-3)
        assert found[f"position{suffix}"] == pytest.approx(position, abs=1e-3)


@pytest.mark.parametrize("engine", ["ghost", "derivative"])
def test_position_of_a_global_choice(reference, engine):
    net, right = reference
    names = [name for name, _ in net.named_parameters()]
    size = {"per_device_train_batch_size": 8}
    plugin = DataRegularization(scope="global", engine=engine, frac=0.5, position_steps=1)
    found = logged(train(plugin, net, **FEW, **SGD, **size))
    cosine, position = expected_angles(right, right.topk([names], 4), names)
    assert found["cosine"] == pytest.approx(cosine, abs=1e-3)
    assert found["position"] == pytest.approx(position, abs=1e-3)


def test_position_runs_from_full_training_to_target_only():
    for position_steps in (0, 1):
        found = {}
        for radius in (0.0, 0.5, 1e4):
            plugin = DataRegularization(rule="ball", radius=radius, passes="two", position_steps=position_steps)
            found[radius] = logged(train(plugin, max_steps=1))["position"]
        assert found[0.0] == pytest.approx(0, abs=2e-3)  # a root of rounding
        assert 0.05 < found[0.5] < 0.95
        assert found[1e4] == pytest.approx(1, abs=2e-3)


def test_asking_for_the_position_changes_nothing_but_the_log():
    """With dropout, so that a pass more would move the random state."""
    net = model()
    for module in net.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    plugins = [DataRegularization(position_steps=n) for n in (0, 2)]
    runs = [train(plugin, net, gradient_accumulation_steps=2, max_steps=3) for plugin in plugins]
    for (name, a), (_, b) in zip(*(parameters(run).items() for run in runs), strict=True):
        assert torch.equal(a, b), name
    key = "data-regularization/position"
    logged_at = [[log["step"] for log in run.state.log_history if key in log] for run in runs]
    assert logged_at == [[], [1, 3]]


def test_the_start_says_which_metrics_come(capsys):
    for options, said in (
        ({}, "one pass; metrics kept, agreeing, update_cosine; no cosine and position"),
        ({"rule": "cone"}, "engine direct over"),
        ({"scope": "global", "position_steps": 5}, "exactly, every 5 steps"),
        ({"engine": "sketch"}, "metrics kept, agreeing; cosine and position by engine=sketch"),
        (
            {"engine": "sketch", "with_target": True},
            "metrics kept, agreeing, update_cosine; cosine and position by engine",
        ),
    ):
        train(DataRegularization(**options), max_steps=1)
        assert said in capsys.readouterr().out


# -- the run folder --------------------------------------------------------------------------------------------------


def test_table_and_plot_from_the_run_folder(tmp_path, capsys):
    """Counts against the weights of each step, seen by a spy on the recorder."""
    seen = []

    class Spy(DataRegularization):
        def _begin_step(self, samples, target):
            seen.append(super()._begin_step(samples, target))
            return seen[-1]

    plugin = Spy(frac=0.5, table=True)
    trainer = train(plugin, data=GENERAL.select(range(8)), max_steps=4, num_train_epochs=2, output_dir=str(tmp_path))
    kept, samples = kept_report.read(tmp_path)
    names = [name for name, _ in trainer.model.named_parameters()]
    assert kept.layers == tuple(layer.name for layer in find_layers(trainer.model, names)[0])
    assert kept.steps == (1, 2, 3, 4)
    for shares, step in zip(kept.shares, seen, strict=True):
        torch.testing.assert_close(torch.tensor(shares), (step.weights > 0).float().mean(1), rtol=0, atol=1e-5)
    assert sum(one.seen for one in samples) == 16
    assert {one.id for one in samples} <= {sample_id(row["input_ids"]) for row in trainer.train_dataset}
    assert [one.kept for one in samples] == sorted((one.kept for one in samples), reverse=True)
    mean_kept = sum(one.seen * one.kept for one in samples) / 16
    assert mean_kept == pytest.approx(float(torch.cat([(s.weights > 0).float() for s in seen], 1).mean()), abs=1e-4)
    texts = {sample_id(row["input_ids"]): TOKENIZER.decode(row["input_ids"]) for row in trainer.train_dataset}
    assert all(one.text == texts[one.id] for one in samples)

    kept_report.main([str(tmp_path), "--rows", "1"])
    out = capsys.readouterr().out
    assert samples[0].id in out
    assert samples[-1].id in out
    assert samples[2].id not in out
    assert (tmp_path / "data_regularization" / "kept.png").stat().st_size > 1000


def test_the_rows_of_a_sample_count_its_layers(reference, tmp_path):
    """Each sample's share of layers, against the definition of layer-wise top-k."""
    net, right = reference
    groups = layers_of(net)
    scores = [right.scores(names) for names in groups]
    kept = [sorted(range(8), key=lambda i, s=s: -s[i])[:4] for s in scores]
    plugin = DataRegularization(frac=0.5, table=True)
    trainer = train(plugin, net, **FEW, **SGD, per_device_train_batch_size=8, output_dir=str(tmp_path))
    by_id = {one.id: one for one in kept_report.read(tmp_path)[1]}
    for i, row in enumerate(trainer.train_dataset):
        one = by_id[sample_id(row["input_ids"])]
        assert one.kept == pytest.approx(sum(i in rows for rows in kept) / len(groups), abs=1e-5)


def test_files_of_several_ranks_are_read_as_one(tmp_path):
    layers, steps = ("a", "b"), (1, 2)
    kept = [
        kept_report.Kept(layers, steps, ((0.0, 1.0), (0.5, 0.5))),
        kept_report.Kept(layers, steps, ((1.0, 1.0), (1.0, 1.0))),
    ]
    for rank in range(2):
        shared = kept_report.Sample("x", 1 + 2 * rank, float(rank), 2.0 * rank, "both, ranks")
        kept_report.write(tmp_path, rank, kept[rank], [shared, kept_report.Sample(f"{rank}", 1, 0.5, 1.0, "")])
    both, samples = kept_report.read(tmp_path)
    assert both.shares == ((0.5, 1.0), (0.75, 0.75))
    assert {one.id: (one.seen, one.kept, one.weight) for one in samples} == {
        "x": (4, 0.75, 1.5),
        "0": (1, 0.5, 1.0),
        "1": (1, 0.5, 1.0),
    }
    assert [one.id for one in kept_report.extremes(samples, 1)] == ["x", "1"]


def test_a_run_without_diagnostics_names_the_option(tmp_path):
    with pytest.raises(SystemExit):
        kept_report.main([str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="table=true"):
        kept_report.read(tmp_path)


# -- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"scope": "global"}])
def test_counts_go_on_after_a_resume(tmp_path, options):
    """Saved at step 2 of 4: the files of the resumed run are those of the run without a break, to the byte."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path)}
    train(DataRegularization(table=True, **options), **settings)
    folder = tmp_path / "data_regularization"
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {*whole} == {"kept-00000.csv", "samples-00000.csv"}
    for path in folder.iterdir():
        path.unlink()
    resumed = train(DataRegularization(table=True, **options), resume=str(tmp_path / "checkpoint-2"), **settings)
    assert resumed.state.global_step == 4
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    with (folder / "kept-00000.csv").open() as file:
        assert [row[0] for row in csv.reader(file)] == ["step", "1", "2", "3", "4"]


def test_without_a_table_a_checkpoint_holds_no_counts():
    plugin = DataRegularization()
    train(plugin, max_steps=1)
    assert plugin.state_dict() == {}
    plugin.load_state_dict({})


def test_counts_of_other_layers_are_refused():
    plugin, other = DataRegularization(table=True), DataRegularization(table=True, scope="global")
    train(plugin, max_steps=1)
    train(other, max_steps=1)
    with pytest.raises(ValueError, match="reset_plugin_state"):
        other.load_state_dict(plugin.state_dict())
