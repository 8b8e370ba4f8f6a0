"""Averages of checkpoints on disk against arithmetic on whole state dicts, and against the averages of a run."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from on_disk import average, save, weights
from safetensors.torch import load_file, save_file
from tiny_runs import Recorder, trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_ext.errors import ConfigurationError
from trl_ext.testing import tiny_llama

SHARDS = "20KB"  # several shards of a model of 70 kB
ROUNDING = {"rtol": 1e-6, "atol": 1e-8}  # fp32 results of fp64 sums against fp64


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [save(root / f"model-{seed}", seed, SHARDS) for seed in range(3)]


def check(folder: Path, expected) -> None:
    """Every tensor is what `expected` says of the inputs' tensors of that name."""
    found = weights(folder)
    assert found
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected(name), **ROUNDING)


def inputs_of(folders):
    tensors = [{name: tensor.double() for name, tensor in weights(folder).items()} for folder in folders]
    return lambda name: [each[name] for each in tensors]


def test_mean_of_sharded_models_loads_and_says_where_it_came_from(three, tmp_path):
    output = tmp_path / "mean"
    average(*three, "-o", output, "--max-shard-size", "30KB")
    of = inputs_of(three)
    check(output, lambda name: sum(of(name)) / 3)
    assert set(weights(output)) == set(weights(three[0]))
    assert len(list(output.glob("model-*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(output)
    torch.testing.assert_close(model.lm_head.weight.double(), sum(of("lm_head.weight")) / 3, **ROUNDING)
    assert (
        AutoTokenizer.from_pretrained(output)("1+1").input_ids
        == AutoTokenizer.from_pretrained(three[0])("1+1").input_ids
    )
    card = (output / "README.md").read_text()
    assert all(str(folder) in card for folder in three)
    assert "0.333333" in card
    assert json.loads((output / "averaging.json").read_text())["method"] == "mean"


def test_weighted_and_wise_ft(three, tmp_path):
    of = inputs_of(three)
    average(*three, "-o", tmp_path / "weighted", "-m", "weighted", "--weights", "0.5,0.2,0.3")
    check(tmp_path / "weighted", lambda name: 0.5 * of(name)[0] + 0.2 * of(name)[1] + 0.3 * of(name)[2])
    average(*three[:2], "-o", tmp_path / "wise", "-m", "wise-ft", "--alpha", "0.25")
    check(tmp_path / "wise", lambda name: 0.75 * of(name)[0] + 0.25 * of(name)[1])


def on_sphere(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    angle = math.acos(float((a * b).sum() / (a.norm() * b.norm())))
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def test_slerp_of_weights_and_of_task_vectors(three, tmp_path):
    of = inputs_of(three)

    def expected(name, base=None):
        a, b, start = of(name)
        if torch.equal(a, b):  # norms: all ones
            return a
        return on_sphere(a, b, 0.3) if base is None else start + on_sphere(a - start, b - start, 0.3)

    average(*three[:2], "-o", tmp_path / "slerp", "-m", "slerp", "--alpha", "0.3")
    check(tmp_path / "slerp", expected)
    average(*three[:2], "-o", tmp_path / "warp", "-m", "slerp", "--alpha", "0.3", "--base", three[2])
    check(tmp_path / "warp", lambda name: expected(name, base=three[2]))


def test_the_sphere_keeps_the_norm_where_the_line_does_not(three, tmp_path):
    average(*three[:2], "-o", tmp_path / "slerp", "-m", "slerp")
    a, b = (weights(folder)["lm_head.weight"] for folder in three[:2])
    found = weights(tmp_path / "slerp")["lm_head.weight"].norm()
    assert found == pytest.approx(float((a.norm() + b.norm()) / 2), rel=1e-2)  # the two norms differ by about 1 %
    assert (a + b).norm() / 2 < 0.8 * found


def test_dtypes_are_kept_or_chosen_and_sums_are_not_rounded_on_the_way(tmp_path):
    folders = [save(tmp_path / str(seed), seed, dtype=torch.bfloat16) for seed in range(4)]
    of = inputs_of(folders)
    average(*folders, "-o", tmp_path / "kept")
    found = weights(tmp_path / "kept")
    for name, tensor in found.items():
        assert torch.equal(tensor, (sum(of(name)) / 4).to(torch.bfloat16)), name  # a quarter is exact
    average(*folders, "-o", tmp_path / "wide", "--dtype", "float32")
    check(tmp_path / "wide", lambda name: sum(of(name)) / 4)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "wide").dtype == torch.float32


def test_a_tied_head_stored_in_one_input_only_is_no_obstacle(tmp_path):
    folders = [save(tmp_path / str(seed), seed, tie=True) for seed in range(2)]
    stored = weights(folders[1])
    save_file(
        stored | {"lm_head.weight": stored["model.embed_tokens.weight"].clone()},
        folders[1] / "model.safetensors",
        {"format": "pt"},
    )
    average(*folders, "-o", tmp_path / "mean")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mean")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    of = inputs_of(folders)
    check(tmp_path / "mean", lambda name: sum(of(name)) / 2)


# Along one run.


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of 6 steps with a checkpoint of each, and the online averages of the same weights beside."""
    root = tmp_path_factory.mktemp("run")
    for name, plugin in {
        "ema": "ema:decay=[0.8,0.5]",
        "warm": "ema:decay=0.3,warmup=true,start=1",
        "lawa": "lawa:k=3,every=2",
        "swa": "swa",
    }.items():
        online = trainer(root / name, [plugin], recorder=Recorder(), save_strategy="steps", save_steps=1)
        if name == "ema":
            online.accelerator.unwrap_model(online.model).save_pretrained(root / "start")
        online.train()
        online.save_model()
    return root


ONLINE = {"rtol": 1e-5, "atol": 1e-7}  # fp32 recursion online, one fp64 sum offline


@pytest.mark.parametrize(
    ("online", "arguments"),
    [
        ("ema", ["-m", "ema", "--decay", "0.8", "--base", "start"]),
        ("warm", ["-m", "ema", "--decay", "0.3", "--warmup"]),
        ("lawa", ["-m", "lawa", "--last", "3", "--every", "2"]),
        ("swa", ["-m", "lawa"]),
    ],
)
def test_the_offline_average_of_the_checkpoints_equals_the_online_one(run, tmp_path, online, arguments):
    arguments = [run / part if part == "start" else part for part in arguments]
    average(run / online, "-o", tmp_path / "offline", *arguments)
    found, expected = weights(tmp_path / "offline"), weights(run / online)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **ONLINE)
    raw = weights(run / online / "checkpoint-6")
    assert not torch.allclose(found["lm_head.weight"], raw["lm_head.weight"], atol=1e-4)


def test_any_average_of_a_sweep_can_be_taken_out_of_a_checkpoint(run, tmp_path):
    average(run / "ema/checkpoint-6", "-o", tmp_path / "fast", "-m", "online", "--name", "ema_0.5")
    average(run / "ema", "-o", tmp_path / "offline", "-m", "ema", "--decay", "0.5", "--base", run / "start")
    found, expected = weights(tmp_path / "fast"), weights(tmp_path / "offline")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **ONLINE)
    with pytest.raises(Exception, match=r"no average 'ema_0.9'; it holds ema_0.5, ema_0.8"):
        average(run / "ema/checkpoint-6", "-o", tmp_path / "none", "-m", "online", "--name", "ema_0.9")


@pytest.mark.parametrize("parameters", ["", "lm_head"])
def test_an_average_of_a_bf16_run_is_bf16(tmp_path, parameters):
    model = tiny_llama(hidden=16).to(torch.bfloat16)
    plugin = {"name": "ema", "decay": 0.5, "parameters": parameters}
    trainer(tmp_path / "run", [plugin], model=model, save_strategy="steps", save_steps=6).train()
    checkpoint = tmp_path / "run/checkpoint-6"
    state = load_file(checkpoint / "trl_ext/ema/state.safetensors")
    assert state["ema/lm_head.weight"].dtype == torch.float32
    average(checkpoint, "-o", tmp_path / "out", "-m", "online")
    raw, found = weights(checkpoint), weights(tmp_path / "out")
    for name in raw:
        assert torch.equal(found[name], state.get(f"ema/{name}", raw[name]).to(torch.bfloat16)), name
        assert found[name].dtype == torch.bfloat16
    assert not torch.equal(found["lm_head.weight"], raw["lm_head.weight"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    average(checkpoint, "-o", tmp_path / "wide", "-m", "online", "--dtype", "float32")
    assert torch.equal(weights(tmp_path / "wide")["lm_head.weight"], state["ema/lm_head.weight"])


def test_runs_are_read_in_the_order_of_their_steps(run, tmp_path):
    renamed = tmp_path / "run"
    renamed.mkdir()
    for step, new in ((1, 9), (2, 10), (3, 100)):
        shutil.copytree(run / f"ema/checkpoint-{step}", renamed / f"checkpoint-{new}")
    average(renamed, "-o", tmp_path / "last", "-m", "lawa", "--last", "2")
    of = inputs_of([renamed / "checkpoint-10", renamed / "checkpoint-100"])
    check(tmp_path / "last", lambda name: sum(of(name)) / 2)


# The command itself.


def test_dry_run_checks_and_writes_nothing(three, tmp_path):
    text = average(*three, "-o", tmp_path / "mean", "--dry-run")
    assert "0.333333" in text
    assert str(three[2]) in text
    assert not list(tmp_path.iterdir())


def test_an_existing_output_is_kept_unless_told_otherwise(three, tmp_path):
    output = tmp_path / "mean"
    average(*three, "-o", output, "--max-shard-size", "20KB")
    assert len(list(output.glob("model-*.safetensors"))) > 1
    with pytest.raises(ConfigurationError, match="--overwrite"):
        average(*three[:2], "-o", output)
    average(*three[:2], "-o", output, "--overwrite")
    of = inputs_of(three[:2])
    check(output, lambda name: sum(of(name)) / 2)
    assert {path.name for path in tmp_path.iterdir()} == {"mean"}
    assert [path.name for path in output.glob("model*")] == ["model.safetensors"]


def test_the_command_line_finds_it(three, tmp_path):
    command = [Path(sys.executable).with_name("trl-ext"), "average", *three[:2], "-o", tmp_path / "mean"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    of = inputs_of(three[:2])
    check(tmp_path / "mean", lambda name: sum(of(name)) / 2)


def test_mergekit_brings_more_methods(three, tmp_path):
    pytest.importorskip("mergekit", reason="the optional extra trl-ext-averaging[mergekit] is not installed")
    output = tmp_path / "linear"
    average(*three[:2], "-o", output, "-m", "mergekit:linear", "--weights", "0.3,0.7")
    of = inputs_of(three[:2])
    check(output, lambda name: 0.3 * of(name)[0] + 0.7 * of(name)[1])
    average(
        *three[:2], "-o", tmp_path / "ties", "-m", "mergekit:ties", "--weights", "0.5,0.5", "--base", three[2],
        "--parameters", '{"density": 0.5}',
    )  # fmt: skip
    AutoModelForCausalLM.from_pretrained(tmp_path / "ties")
