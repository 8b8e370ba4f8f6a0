"""`trl-ext compare` on tiny models: what is trained and measured, interruption, refusals, and the files."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl_ext_probing.answers import exact_answer
from trl_ext_probing.commands import compare
from trl_ext_probing.comparing.arm_runs import files_in
from trl_ext_probing.comparing.compare_plot import draw_comparison
from trl_ext_probing.comparing.compare_settings import CompareSettings
from trl_ext_probing.comparing.compare_summary import Cell, Metric
from trl_ext_probing.comparing.comparison import read_comparison
from trl_ext_probing.intervals import seed_mean
from trl_ext_probing.tables import table

from trl_ext.errors import ConfigurationError
from trl_ext.testing import Addition, save_model, tiny_llama, tiny_tokenizer

PLUGIN = '''
from dataclasses import dataclass
from trl_ext import hookimpl

@dataclass(eq=False)
class Still:
    """Makes every gradient 0, so that nothing is learned."""

    @hookimpl
    def gradients_ready(self, gradients, streams):
        gradients.mul_(0.0)

@dataclass(eq=False)
class Broken:
    @hookimpl
    def gradients_ready(self, gradients, streams):
        raise ValueError("broken")

def width(model, tokenizer):
    return {"width": model.config.hidden_size, "undefined": float("nan")}
'''
COMMAND = [sys.executable, "-m", "trl_ext", "compare"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, data with a column of kinds, a plugin and a function."""
    folder = tmp_path_factory.mktemp("compare")
    save_model(tiny_llama(hidden=16, layers=1), tiny_tokenizer(), folder / "base")
    for name, split in (("train", "train"), ("held_out", "held_out")):
        rows = Addition(digits=2).dataset(24, split=split).to_list()
        for row in rows:
            row["kind"] = "long" if len(row["answer"]) > 2 else "short"
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.py").write_text(PLUGIN)
    return folder


def content(folder: Path) -> dict[str, Any]:
    return {
        "base": {
            "trainer": "sft",
            "model_name_or_path": str(folder / "base"),
            "dataset_name": str(folder / "train.jsonl"),
            "max_steps": 8,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
            "bf16": False,
            "use_cpu": True,
            "activation_checkpointing": False,
            "logging_steps": 4,
        },
        "arms": {"plain": {}, "still": {"plugins": [f"{folder}/mine.py:Still"]}},
        "seeds": [0, 1],
        "measures": {
            "held": {"loss": {"dataset": str(folder / "held_out.jsonl"), "by": "kind", "device": "cpu"}},
            "facts": {"function": {"name": f"{folder}/mine.py:width", "better": "lower"}},
        },
    }


def write(path: Path, asked: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(asked, sort_keys=False))
    return path


def results(output: Path) -> dict[str, Any]:
    found = json.loads((output / "results.json").read_text())
    del found["command"]  # names the folder
    for arm in found["arms"].values():
        for run in arm["runs"]:
            del run["commands"]
    return found  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def done(folder: Path) -> Path:
    output = folder / "out"
    compare(config=write(folder / "asked.yaml", content(folder)), output=output)
    return output


# -- what is measured ------------------------------------------------------------------------------------------------


def held_out_nll(folder: Path, model: Path, kind: str | None = None) -> float:
    """Mean over the completions' tokens and EOS, a row at a time and by logits."""
    tokenizer, loaded = tiny_tokenizer(), AutoModelForCausalLM.from_pretrained(model)
    total, tokens = 0.0, 0
    for row in map(json.loads, (folder / "held_out.jsonl").read_text().splitlines()):
        if kind in (None, row["kind"]):
            prompt, completion = (tokenizer(row[name])["input_ids"] for name in ("prompt", "completion"))
            labels = torch.tensor([*completion, tokenizer.eos_token_id])
            with torch.no_grad():
                logits = loaded(torch.tensor([[*prompt, *labels]])).logits[0, len(prompt) - 1 : -1]
            total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            tokens += len(labels)
    return total / tokens


def test_values_are_those_of_the_models_that_are_left(folder: Path, done: Path) -> None:
    found = results(done)
    for arm in ("plain", "still"):
        for run in found["arms"][arm]["runs"]:
            model = done / run["folder"] / "1-sft" / "model"
            for kind, name in ((None, "held/nll"), ("long", "held/nll, kind=long"), ("short", "held/nll, kind=short")):
                # fp32 sums of some hundred terms
                assert run["values"][name] == pytest.approx(held_out_nll(folder, model, kind), rel=1e-4)
            assert run["values"]["facts/width"] == 16
            assert run["values"]["facts/undefined"] is None
    base = found["metrics"]["held/nll"]["base"]
    assert base == pytest.approx(held_out_nll(folder, folder / "base"), rel=1e-4)
    still = found["metrics"]["held/nll"]["cells"]["still"]
    assert still["values"] == [base, base], "its plugin lets it learn nothing"
    plain = found["metrics"]["held/nll"]["cells"]["plain"]
    assert max(plain["values"]) < base
    pairs = [a - b for a, b in zip(still["values"], plain["values"], strict=True)]
    assert still["difference"]["value"] == pytest.approx(sum(pairs) / 2)
    assert still["seeds_needed"] >= 2
    assert found["metrics"]["facts/width"]["better"] == "lower"


@pytest.mark.slow
def test_the_commands_that_it_names_train_the_same(folder: Path, done: Path, tmp_path: Path) -> None:
    run = json.loads((done / "results.json").read_text())["arms"]["still"]["runs"][1]
    (command,) = run["commands"]
    words = shlex.split(command)
    subprocess.run(
        [sys.executable, "-m", "trl_ext", *words[1:], "--output_dir", str(tmp_path)], check=True, capture_output=True
    )
    theirs = load_file(done / run["folder"] / "1-sft" / "model" / "model.safetensors")
    ours = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_costs_are_counted(folder: Path, done: Path) -> None:
    """8 steps of 4 rows, of 24: each row once, and 8 rows twice."""
    tokenizer = tiny_tokenizer()
    lengths = [
        len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) + 1
        for row in map(json.loads, (folder / "train.jsonl").read_text().splitlines())
    ]
    for arm in results(done)["arms"].values():
        for run in arm["runs"]:
            assert run["steps"] == 8
            assert sum(lengths) < run["tokens"] < sum(lengths) + 8 * max(lengths)
    costs = json.loads((done / "costs.json").read_text())["arms"]
    assert all(cost["seconds"] > 0 and cost["peak_memory"] > 0 for runs in costs.values() for cost in runs)


@pytest.mark.slow
def test_what_is_there_is_used_and_what_changed_is_done_again(
    folder: Path, done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new arm is trained, and no other one; a new measure trains none."""
    before = {path: path.stat().st_mtime_ns for path in done.rglob("model.safetensors")}
    asked = content(folder)
    asked["arms"] = {"slow": {"learning_rate": 0.001}, **asked["arms"]}
    asked["measures"]["facts"] = {"function": {"name": f"{folder}/mine.py:width"}}
    asked["budget"] = {"at_once": 2}
    compare(config=write(folder / "more.yaml", asked), output=done)
    after = {path: path.stat().st_mtime_ns for path in done.rglob("model.safetensors")}
    assert {path: after[path] for path in before} == before
    assert len(after) == len(before) + 2
    assert len(list(done.glob("runs/plain-seed0-*/measures/held-*"))) == 1, "scores that are there are used again"
    found = results(done)
    assert list(found["metrics"]["held/nll"]["cells"]) == ["slow", "plain", "still"]
    assert found["metrics"]["facts/width"]["better"] == "higher"
    # Other data under the same name are other data.
    text = (folder / "train.jsonl").read_text()
    try:
        (folder / "train.jsonl").write_text(text.replace("1", "2"))
        compare(config=folder / "asked.yaml", output=done)
    finally:
        (folder / "train.jsonl").write_text(text)
    assert len(list(done.rglob("model.safetensors"))) == len(after) + 4
    compare(config=folder / "asked.yaml", output=done)  # and what was there before is still there
    assert len(list(done.rglob("model.safetensors"))) == len(after) + 4


def test_files_are_found_in_any_spelling_and_punctuation_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop sequence of "." is not the working folder, whose content changes with every run."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for name in ("data/rows.jsonl", "mine.py"):
        Path(name).write_text("1")
    settings = {
        "plugins": ["power:file=data/rows.jsonl", "mine.py:f"],
        "dataset_name": "./data",
        "stop": [".", ".."],
    }
    found = files_in(settings)
    assert list(found) == ["./data", "data/rows.jsonl", "mine.py"]
    Path("data/rows.jsonl").write_text("22")
    changed = {name for name, digest in files_in(settings).items() if digest != found[name]}
    assert changed == {"./data", "data/rows.jsonl"}


def test_modules_of_the_working_folder_are_files_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward that is changed is another one, however it is named; an installed module has a version."""
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    for name in ("rewards.py", "mine/__init__.py", "mine/more.py", "train.py", "train.jsonl"):
        Path(name).write_text("")
    settings = {
        "reward_funcs": ["rewards.exact"],
        "plugins": ["mine:Still", {"name": "mine.more:Still"}, "trl_ext_probing.answers:exact_answer"],
        "dataset_name": "train.jsonl",
    }
    assert list(files_in(settings)) == ["mine/__init__.py", "mine/more.py", "rewards.py", "train.jsonl"]


@pytest.mark.slow
def test_a_run_stays_that_of_the_data_it_was_trained_on(folder: Path, tmp_path: Path) -> None:
    """Here a measure changes the data; a person may while a comparison of hours runs."""
    (tmp_path / "train.jsonl").write_text(text := (folder / "train.jsonl").read_text())
    change = f"def change(*_):\n    open({str(tmp_path / 'train.jsonl')!r}, 'a').write({text!r})\n    return 1.0\n"
    (tmp_path / "changing.py").write_text(change)
    asked = content(folder) | {"arms": {"plain": {}}, "seeds": 1}
    asked["base"] |= {"dataset_name": str(tmp_path / "train.jsonl")}
    asked["measures"] = {"one": {"function": f"{tmp_path}/changing.py:change"}}
    compare(config=write(tmp_path / "asked.yaml", asked), output=tmp_path / "out")
    (run,) = results(tmp_path / "out")["arms"]["plain"]["runs"]
    assert (tmp_path / "out" / run["folder"] / "1-sft" / "model").is_dir()
    assert run["steps"] == 8


# -- interruption ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["a training", pytest.param("measures", marks=pytest.mark.slow)])
def test_killed_and_started_again_it_comes_to_the_same(
    folder: Path, done: Path, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte, but for seconds and memory. Killed with -9 in the second run, past its first checkpoint."""
    compare(config=folder / "asked.yaml", output=done)
    output = tmp_path / "out"
    command = [*COMMAND, str(folder / "asked.yaml"), "--output", str(output)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    sign = {"a training": "still-seed0-*/1-sft/model/checkpoint-*", "measures": "still-seed0-*/measured-*/job.json"}
    while not any((output / "runs").glob(sign[where])):
        assert process.poll() is None, "finished before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "results.json").exists()
    wait_until_nobody_works_in(output)
    finished = subprocess.run(command, check=True, capture_output=True, text=True)
    assert results(output) == results(done)
    for name in ("rows.csv", "plot.png"):
        assert (output / name).read_bytes() == (done / name).read_bytes()
    assert "### held/nll (nats per token; lower is better)" in finished.stdout
    assert not list(output.rglob("checkpoint-*"))


def wait_until_nobody_works_in(folder: Path) -> None:
    """The processes end a moment after the one that was killed."""
    deadline = time.monotonic() + 60
    while any(str(folder) in words for words in _commands()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)


def _commands() -> Iterator[str]:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            yield (process / "cmdline").read_text()
        except OSError:
            continue


def test_a_run_that_fails_is_told_and_the_others_are_reported(folder: Path, tmp_path: Path) -> None:
    asked = content(folder)
    asked["arms"]["still"] = {"learning_rate": 1e30, "nonfinite": "raise"}
    asked["seeds"] = 1
    with pytest.raises(ConfigurationError, match=r"1 of the runs failed, the first so: still, seed 0 ended with.*NaN"):
        compare(config=write(tmp_path / "asked.yaml", asked), output=tmp_path / "out")
    found = results(tmp_path / "out")
    assert found["missing"] == ["still, seed 0"]
    assert found["metrics"]["held/nll"]["cells"]["plain"]["mean"]["value"] > 0
    assert "| still | none | none | needs two pairs |" in (tmp_path / "out" / "table.md").read_text()


def test_a_measure_that_fails_on_the_model_before_training_ends_all(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text("def wrong(model, tokenizer):\n    raise KeyError('accuracy')\n")
    asked = content(folder)
    asked["measures"]["facts"] = {"function": f"{tmp_path}/wrong.py:wrong"}
    with pytest.raises(ConfigurationError, match=r"before any training cannot be measured.*KeyError: 'acc.*log\.txt"):
        compare(config=write(tmp_path / "asked.yaml", asked), output=tmp_path / "out")
    assert not list((tmp_path / "out").rglob("model.safetensors"))


def test_plugins_of_the_environment_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An arm without plugins would train with them, and look like the plain one."""
    monkeypatch.setenv("TRL_EXT_PLUGINS", "power:alpha=1")
    with pytest.raises(ConfigurationError, match=r"TRL_EXT_PLUGINS is set.*unset it"):
        compare(config=write(tmp_path / "asked.yaml", content(folder)), output=tmp_path / "out")


@pytest.mark.slow
def test_a_budget_that_is_used_up_leaves_the_rest_for_another_time(folder: Path, tmp_path: Path) -> None:
    asked = content(folder) | {"seeds": 1, "budget": {"minutes": 1e-9}}
    config = write(tmp_path / "asked.yaml", asked)
    compare(config=config, output=tmp_path / "out")
    assert results(tmp_path / "out")["missing"] == ["plain, seed 0", "still, seed 0"]
    compare(config=write(config, asked | {"budget": {}}), output=tmp_path / "out")
    assert results(tmp_path / "out")["missing"] == []


# -- learning rates, stages, sizes -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_rates_are_chosen_on_seeds_that_are_not_reported(folder: Path, tmp_path: Path) -> None:
    asked = content(folder) | {"tune": {"learning_rate": [0.01, 1e-9, 1e30], "measure": "held/nll", "seeds": [7]}}
    broken = f"{folder}/mine.py:Broken"
    asked["arms"] = {"plain": {}, "broken": {"plugins": [broken]}, "short": {"max_steps": 4}}
    asked["measures"].pop("facts")
    asked["seeds"] = [3]
    config = write(tmp_path / "asked.yaml", asked | {"budget": {"minutes": 1e-9}})
    compare(config=config, output=tmp_path / "out")
    assert results(tmp_path / "out")["missing"] == ["plain, seed 3", "broken, seed 3", "short, seed 3"]
    with pytest.raises(ConfigurationError, match="broken: no learning rate of `tune` has a value of held/nll: broken"):
        compare(config=write(tmp_path / "asked.yaml", asked), output=tmp_path / "out")
    found = results(tmp_path / "out")
    rates = {name: arm["learning_rate"] for name, arm in found["arms"].items()}
    assert rates == {"plain": 0.01, "broken": None, "short": 0.01}
    assert found["missing"] == ["broken, seed 3"]
    assert [run["seed"] for run in found["arms"]["plain"]["runs"]] == [3]
    assert (
        "Learning rates were chosen by held on seeds that are not reported" in (tmp_path / "out/table.md").read_text()
    )


@pytest.mark.slow
def test_stages_follow_one_another_and_a_size_is_laid_over(folder: Path, tmp_path: Path) -> None:
    asked = content(folder)
    asked["arms"] = {"twice": [{}, {"learning_rate": 1e-12}]}
    asked["measures"].pop("facts")
    asked["sizes"] = {"smoke": {"base": {"max_steps": 2}, "seeds": [5]}}
    compare(config=write(tmp_path / "asked.yaml", asked), output=tmp_path / "out", size="smoke")
    found = results(tmp_path / "out")
    (run,) = found["arms"]["twice"]["runs"]
    assert (run["seed"], run["steps"]) == (5, 4)
    first, second = (done_in(tmp_path / "out" / run["folder"], stage) for stage in ("1-sft", "2-sft"))
    base = load_file(folder / "base" / "model.safetensors")
    for name in base:  # the second stage moves nothing that fp32 can tell, and the first one does
        torch.testing.assert_close(second[name], first[name], rtol=0, atol=1e-9)
    assert any(not torch.equal(first[name], base[name]) for name in base)


def done_in(run: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(run / stage / "model" / "model.safetensors")


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arm": {}}, r"unknown keys arm. Did you mean 'arms'\?"),
        ({"measures": None}, "lacks measures"),
        ({"arms": ["a"]}, "arms is a list, and should be a dict"),
        ({"arms": {"a b": {}, "a-b": {}}}, "of different names"),
        ({"arms": {"base": {}}}, "none called 'base'"),
        ({"arms": {"a": {"seed": 3}}}, "seed is this command's own; use `seeds`"),
        ({"arms": {"a": {"output_dir": "x"}}}, "output_dir is this command's own; use --output"),
        ({"arms": {"a": "power"}}, "an arm is a mapping of settings, or a list"),
        ({"arms": {"a": {"lerning_rate": 1}}}, r"arms: 'a': there is no setting 'lerning_rate'. Did you mean"),
        ({"arms": {"a": {"plugins": ["no-such-plugin"]}}}, "arms: 'a': .*no-such-plugin"),
        ({"arms": {"a": {"dataset_name": "nowhere.jsonl"}}}, "arms: 'a': .*nowhere.jsonl"),
        ({"arms": {"a": {"trainer": "sfd"}}}, "trainer: 'sfd' is not one of sft"),
        ({"arms": {"a": {"save_only_model": True}}}, "save_only_model: an interrupted training could not go on"),
        ({"seeds": [1, 1]}, "seeds: .* different whole numbers"),
        ({"seeds": []}, r"seeds: \[\] is no number of seeds"),
        ({"budget": {"minutes": -1}}, "budget: minutes: -1 is no number above 0"),
        ({"measures": {"a": {"los": {}}}}, r"measures: a: unknown keys los. Did you mean 'loss'\?"),
        ({"measures": {"a": {"loss": {}}}}, "measures: a lacks dataset"),
        ({"measures": {"a": {"loss": {"dataset": "nowhere.jsonl"}}}}, "nowhere.jsonl"),
        ({"measures": {"a": {"loss": {"dataset": "HELD", "by": "kinds"}}}}, "by: the data has no column 'kinds'"),
        ({"measures": {"a": {"loss": {"dataset": "HELD", "limit": 0}}}}, "measures: a: --limit 0: at least 1"),
        ({"measures": {"a": {"loss": {"dataset": "HELD", "limit": "x"}}}}, "limit: 'x' is a str, and should be a int"),
        ({"measures": {"a/b": {"function": "m:f"}}}, "'a/b' is to be a folder's name too"),
        ({"measures": {"a": {"function": "no_module:f"}}}, "measures: a: 'no_module:f' cannot be loaded"),
        ({"measures": {"a": {"passk": {"dataset": "HELD", "reward": "m:f", "engine": "server", "base_url": "u"}}}},
         "a server has one model"),
        ({"tune": {"learning_rate": [0.1, 0.2], "measure": "held/nll", "seeds": [1]}}, "1 is among the seeds that are"),
        ({"tune": {"learning_rate": [0.1], "measure": "held/nll", "seeds": [9]}}, "no list of several rates"),
        ({"tune": {"learning_rate": [0.1, 0.2], "measure": "hold/nll", "seeds": [9]}}, "Did you mean 'held'"),
        ({"tune": {"learning_rate": [0.1, 0.2], "seeds": [9]}}, "tune lacks measure"),
        ({"tune": {"learning_rate": [0.1, 0.2], "measure": "held", "seeds": [9]}}, "'held' is no value; held giv"),
        ({"tune": {"learning_rate": [1, 2], "measure": "held/nll", "seeds": [9]}, "arms": {"a": {"learning_rate": 1}}},
         "arms: 'a': learning_rate: `tune` chooses that of every arm"),
        ({"arms": {"a": {"trainer": "gpro"}}}, "arms: 'a': trainer: 'gpro' is not one of"),
        ({"arms": {"a": [{}, {"sft": {"model_name_or_path": "b"}}]}}, "'a': model_name_or_path: a training that foll"),
        ({"arms": {"a": [{"use_peft": True}, {}]}}, "'a': use_peft: it leaves an adapter"),
        ({"arms": {"a": 0}}, "'a' is 0; an arm is a mapping"),
        ({"seeds": True}, "seeds is a bool, and should be a list or int"),
        ({"seeds": [2**32]}, "no number of seeds"),
        ({"budget": {"minutes": True}}, "minutes: True is no number above 0"),
        ({"measures": {}}, "measures: there have to be some"),
        ({"measures": {"a": {"passk": {"dataset": "HELD", "reward": "m:f", "k": [1, 8]}}}},
         r"measures: a: k: \[1, 8\] is a list, and should be a str"),
        ({"measures": {"a": {"loss": {"dataset": "HELD", "columns": "x=y"}}}}, "measures: a: columns: no column 'x'"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_meant_is_refused_before_anything_runs(
    folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    text = json.dumps({key: value for key, value in (content(folder) | change).items() if value is not None})
    (tmp_path / "asked.yaml").write_text(text.replace("HELD", str(folder / "held_out.jsonl")))
    with pytest.raises(ConfigurationError, match=message):
        compare(config=tmp_path / "asked.yaml", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arms: {no: {}}", "arms: YAML reads a name as False, a bool; write it in quotes"),
        ("measures: {1: {function: m:f}}", "measures: YAML reads a name as 1, a int; write it in quotes"),
        ("arms: {a: {}, a: {max_steps: 3}}", "line 1 is not YAML: 'a' is there twice"),
        ("sizes: {1: {}}", "sizes: YAML reads a name as 1"),
        ("sizes: {smoke: 3}", "sizes: smoke: 3 is no mapping"),
        ("sizes: {smoke: {arms: null}}", "sizes: smoke lacks arms"),
        ("sizes: {smoke: {measures: [1]}}", "sizes: smoke: measures is a list, and should be a dict"),
        ("sizes: {smoke: {budget: 5}}", "sizes: smoke: budget is a int, and should be a dict"),
    ],
)
def test_what_yaml_makes_of_a_file_is_refused_in_one_line(
    folder: Path, tmp_path: Path, text: str, message: str
) -> None:
    own = text.partition(":")[0]
    rest = {key: value for key, value in content(folder).items() if key != own}
    (tmp_path / "asked.yaml").write_text(f"{text}\n{yaml.safe_dump(rest)}")
    with pytest.raises(ConfigurationError, match=message):
        read_comparison(CompareSettings(config=tmp_path / "asked.yaml", size="smoke" if own == "sizes" else None))


def test_merged_keys_and_long_texts_are_none_of_these(folder: Path, tmp_path: Path) -> None:
    """What `<<` brings may stand in the mapping itself, too; and a long text of settings names no file."""
    text = "arms:\n  a: &a {learning_rate: 1, max_steps: 2}\n  b: &b {<<: *a, max_steps: 3}\n  c: {<<: *b}\n"
    rest = {key: value for key, value in content(folder).items() if key != "arms"}
    (tmp_path / "asked.yaml").write_text(text + yaml.safe_dump(rest))
    asked = read_comparison(CompareSettings(config=tmp_path / "asked.yaml"))
    assert [arm.stages[0].settings["max_steps"] for arm in asked.arms] == [2, 3, 3]
    assert files_in({"system_prompt": "Think. " * 1000, "x": "." * 300 + "/"}) == {}


def test_a_number_is_the_text_that_an_option_takes(folder: Path, tmp_path: Path) -> None:
    measure = {"passk": {"dataset": str(folder / "held_out.jsonl"), "reward": "m:f", "n": 2, "k": 1}}
    asked = read_comparison(
        CompareSettings(config=write(tmp_path / "asked.yaml", content(folder) | {"measures": {"a": measure}}))
    )
    assert asked.measures["a"].metrics == ("pass@1",)


def test_the_command_refuses_a_size_that_is_not_there_in_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"--size 'gpu': .* has no such size. There are none"):
        compare(config=write(tmp_path / "asked.yaml", content(folder)), size="gpu")
    with pytest.raises(ConfigurationError, match=r"CONFIG: there is no file .*Did you mean 'asked.yaml'"):
        compare(config=tmp_path / "aked.yaml")


EXAMPLES = sorted(
    path for path in (Path(__file__).parents[3] / "examples").rglob("*.yaml") if "\narms:" in path.read_text()
)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_can_be_read_at_every_size(path: Path) -> None:
    sizes = list(yaml.safe_load(path.read_text())["sizes"])
    assert "smoke" in sizes
    for size in (None, *sizes):
        asked = read_comparison(CompareSettings(config=path, size=size))
        assert len(asked.arms) > 1
        assert asked.minutes is not None
        assert (len(asked.seeds) >= 3) == (size != "smoke")
        if path.parent.name == "real":
            assert asked.on_cpu == (size in (None, "smoke"))


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.parent.name == "real"], ids=lambda path: path.name)
def test_the_comparisons_on_a_real_model_run_on_a_tiny_one(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the smallest size, so that every plugin, option, reward and data set that they name is met."""
    for distribution in ("objectives", "averaging", "data_regularization", "mixing", "reachability"):
        pytest.importorskip(f"trl_ext_{distribution}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(path.parent))
    Path("examples").symlink_to(path.parents[1])
    import prepare

    for name, rows in prepare.FILES.items():
        prepare.write_rows(Path(f"runs/real/data/{name}.jsonl"), rows()[:40])
    for seed, name in enumerate(("model", "random")):
        save_model(tiny_llama(hidden=16, layers=1, seed=seed), tiny_tokenizer(), f"runs/real/{name}")
    compare(config=path, size="smoke", output=tmp_path / "out")
    found = results(tmp_path / "out")
    assert found["missing"] == []
    for metric in found["metrics"].values():
        assert all(cell["mean"]["value"] is not None for cell in metric["cells"].values())


def test_the_real_comparisons_take_gsm8k_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(next(path.parent for path in EXAMPLES if path.parent.name == "real")))
    import prepare

    problem = {"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}
    for part in ("train", "test"):
        (tmp_path / f"{part}.jsonl").write_text(json.dumps(problem) + "\n")
    monkeypatch.setattr(sys, "argv", ["", "--data-only", "--gsm8k", str(tmp_path), "--output", str(tmp_path)])
    prepare.main()
    row = json.loads((tmp_path / "data" / "gsm8k_test.jsonl").read_text())
    assert row["prompt"] == [{"role": "user", "content": problem["question"]}]
    assert row["completion"] == [{"role": "assistant", "content": problem["answer"]}]
    assert exact_answer([row["completion"]], [row["answer"]]) == [1.0]
    assert (tmp_path / "data" / "gsm8k.jsonl").is_file()


def test_the_page_needs_nothing_beside_itself(done: Path) -> None:
    text = (done / "report.html").read_text()
    assert "data:image/png;base64," in text
    assert not [word for word in ('src="http', "href=", "<script", "@import", "url(") if word in text]
    assert "held/nll, kind=long (nats per token; lower is better)" in text
    assert os.fspath(done) in text, "the commands"


def test_names_are_drawn_and_written_as_they_are(tmp_path: Path) -> None:
    """None is a formula, ends a cell, or is part of the page."""
    name = "<b>$\\frac$|a"
    cell = Cell((1.0, 2.0), seed_mean([1.0, 2.0]), None, None)
    metrics = [Metric(f"held/nll, kind={name}", "nats", "lower", 0.5, {name: cell})]
    draw_comparison(metrics, 0.95, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").is_file()
    row = table(("arm", "mean"), [(name, "1")]).splitlines()[-1]
    assert row == "| <b>$\\frac$\\|a | 1 |"
