"""Recipes from several checkpoints in one command: what is trained, in which order, what is kept, what is reported."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from trl_ext_probing.commands import excursions
from trl_ext_probing.excursions.excursions_settings import ExcursionSettings
from trl_ext_probing.excursions.recipes import read

from trl_ext.errors import ConfigurationError
from trl_ext.testing import Addition, save_model, tiny_llama, tiny_tokenizer

TASK = Addition(digits=1)
LAUNCHER = """
import json, os, shutil, sys
from pathlib import Path
kind, _, config, _, model, _, folder, *rest = sys.argv[1:]
with open(os.environ["CALLS"], "a") as calls:
    print(kind, Path(config).name, model, folder, *rest, sep="|", file=calls)
if Path(config).read_text().startswith("fail"):
    checkpoint = Path(folder, "checkpoint-2")
    checkpoint.mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        checkpoint.joinpath(name).touch()
    state = {"global_step": 2, "max_steps": 4, "log_history": [], "stateful_callbacks": {}}
    checkpoint.joinpath("trainer_state.json").write_text(json.dumps(state))
    print("out of memory")
    sys.exit(3)
shutil.copytree(model, folder, dirs_exist_ok=True)
"""


def by_checksum(completions: list[str], **columns: Any) -> list[float]:
    return [float(sum(map(ord, c)) % 3 == 0) for c in completions]


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The content of a file, whose launcher copies the model in place of training it, and writes down that it did."""
    for seed in (1, 2):
        save_model(tiny_llama(hidden=16, seed=seed), tiny_tokenizer(), tmp_path / f"step-{seed}")
    (tmp_path / "launch.py").write_text(LAUNCHER)
    for name in ("sft", "rl"):
        (tmp_path / f"{name}.yaml").write_text(f"{name}: 1\n")
    TASK.dataset(4, "prompt_only").to_json(tmp_path / "problems.jsonl")
    TASK.dataset(4, "language_modeling").select_columns(["text"]).to_json(tmp_path / "general.jsonl")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    return {
        "checkpoints": [str(tmp_path / "step-1"), str(tmp_path / "step-2")],
        "recipes": {"SFT": {"sft": "sft.yaml"}, "SFT, then RL": [{"sft": "sft.yaml"}, {"grpo": "rl.yaml"}]},
        "launcher": f"{sys.executable} {tmp_path / 'launch.py'}",
        "passk": {
            "dataset": str(tmp_path / "problems.jsonl"),
            "reward": ["test_excursions:by_checksum"],
            "n": 4,
            "k": "1,4",
            "max_completion_length": 4,
            "device": "cpu",
        },
        "drift": {"dataset": str(tmp_path / "general.jsonl"), "device": "cpu"},
    }


def run(tmp_path: Path, asked: dict[str, Any]) -> list[list[str]]:
    """The trainings that the command started, as the launcher wrote them down."""
    calls = tmp_path / "calls"
    calls.write_text("")
    (tmp_path / "asked.yaml").write_text(yaml.safe_dump(asked, sort_keys=False))
    excursions(config=tmp_path / "asked.yaml", output=tmp_path / "out")
    return [line.split("|") for line in calls.read_text().splitlines()]


def test_each_recipe_starts_from_each_checkpoint_and_each_stage_from_the_one_before(
    tmp_path: Path, asked: dict[str, Any]
) -> None:
    calls = run(tmp_path, asked)
    assert [(kind, config) for kind, config, *_ in calls] == [
        ("sft", "sft.yaml"),
        ("sft", "sft.yaml"),
        ("grpo", "rl.yaml"),
    ] * 2
    for i, checkpoint in enumerate(asked["checkpoints"]):
        alone, first, second = calls[3 * i : 3 * i + 3]
        assert alone[2] == first[2] == checkpoint
        assert second[2] == first[3]
        assert len({alone[3], first[3], second[3]}) == 3
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [(row["checkpoint"], row["recipe"]) for row in rows] == [
        (checkpoint, recipe) for checkpoint in asked["checkpoints"] for recipe in ("base", "SFT", "SFT, then RL")
    ]
    for row in rows:  # the launcher's trainings change nothing, and seeds are the same
        if row["recipe"] != "base":
            assert row["drift"]["value"] == 0
            assert row["difference"]["4"]["value"] == 0
    assert rows[0]["pass_at"] != rows[3]["pass_at"], "other checkpoints, other models"
    head, _, *lines = (tmp_path / "out" / "table.md").read_text().split("\n\n")[0].splitlines()
    assert len(lines) == len(rows)
    assert head.startswith("| checkpoint | recipe | pass@1 | pass@4 | pass@1 - base |")
    assert (tmp_path / "out" / "plot.png").stat().st_size > 10_000


def test_what_has_ended_is_kept_and_what_was_interrupted_goes_on(tmp_path: Path, asked: dict[str, Any]) -> None:
    (tmp_path / "rl.yaml").write_text("fail: 1\n")
    with pytest.raises(ConfigurationError, match=r"RL from .*step-1, .*rl.yaml ended.*out of memory.*goes on here"):
        run(tmp_path, asked)
    (tmp_path / "rl.yaml").write_text("rl: 1\n")
    calls = run(tmp_path, asked)
    assert [call[1] for call in calls] == ["rl.yaml", "sft.yaml", "sft.yaml", "rl.yaml"]
    assert calls[0][4:] == ["--resume_from_checkpoint", f"{calls[0][3]}/checkpoint-2"]
    assert calls[3][4:] == []
    assert run(tmp_path, asked) == []
    (tmp_path / "sft.yaml").write_text("sft: 2\n")
    with pytest.raises(ConfigurationError, match=r"1-sft was made with other settings \(sft.yaml\); move it away"):
        run(tmp_path, asked)
    # Trained again, a stage has its successors trained again too.
    out = tmp_path / "out"
    for folder in out.glob("*/*/1-sft"):
        folder.rename(folder.with_name("old"))
    with pytest.raises(ConfigurationError, match=r"2-grpo was made with other settings \(the stages before\)"):
        run(tmp_path, asked)


def test_a_second_run_may_ask_for_other_figures_and_recipes(tmp_path: Path, asked: dict[str, Any]) -> None:
    run(tmp_path, asked)
    asked["passk"]["k"] = "2"
    asked["recipes"] = {"imitation": asked["recipes"].pop("SFT"), **asked["recipes"]}
    assert [call[0] for call in run(tmp_path, asked)] == ["sft", "sft"]
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [(row["recipe"], list(row["pass_at"])) for row in rows] == [
        (recipe, ["2"]) for recipe in ("base", "imitation", "SFT, then RL")
    ] * 2


def test_a_training_that_leaves_no_model_is_noticed(tmp_path: Path, asked: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"the training left no model in .*1-sft"):
        run(tmp_path, asked | {"launcher": "true"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": ["a"]}, "unknown keys checkpoint. Did you mean .checkpoints.*There are checkpoints"),
        ({"passk": None}, "lacks passk"),
        ({"checkpoints": "step-1"}, "checkpoints is a str, and should be a list"),
        ({"recipes": ["A"]}, "recipes is a list, and should be a dict"),
        ({"recipes": {"A": []}}, "recipe 'A' has no stage"),
        ({"recipes": {"A": {"dpo": "sft.yaml"}}}, "recipe 'A' has .*a stage is `sft: FILE` or `grpo: FILE`"),
        ({"recipes": {"A": {"sft": "none.yaml"}}}, r"recipe 'A' names .*none.yaml', which is no file"),
        ({"recipes": {"base": {"sft": "sft.yaml"}}}, "none a recipe `base`"),
        ({"recipes": {"a b": {"sft": "sft.yaml"}, "a-b": {"sft": "sft.yaml"}}}, "of different names"),
        ({"checkpoints": ["a", "a"]}, "checkpoints have to be there, of different names"),
        ({"passk": {"reward": ["r"]}}, "passk lacks dataset"),
        ({"passk": {"dataset": "d", "reward": ["r"], "temprature": 1}}, "passk: unknown keys temprature. Did you mean"),
        ({"passk": {"dataset": "d", "reward": ["r"], "k": "8", "n": 4}}, r"passk: --k '8' with --n 4: every k is in"),
        ({"passk": {"dataset": "nowhere.jsonl", "reward": ["r"]}}, "there is no file 'nowhere.jsonl'"),
        ({"drift": {"base": "b", "dataset": "d"}}, "drift: unknown keys base"),
        ({"drift": {"dataset": "d", "max_length": 1}}, "drift: --max-length 1: at least 2"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(
    tmp_path: Path, asked: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    content = {key: value for key, value in (asked | change).items() if value is not None}
    with pytest.raises(ConfigurationError, match=message):
        run(tmp_path, content)
    assert (tmp_path / "calls").read_text() == ""


def test_the_example_can_be_read() -> None:
    example = Path(__file__).parents[3] / "examples" / "excursions.yaml"
    asked = read(ExcursionSettings(config=example))
    assert [[stage.kind for stage in stages] for stages in asked.recipes.values()] == [
        ["sft"],
        ["grpo"],
        ["sft", "grpo"],
        ["grpo"],
    ]
    assert asked.launcher == ()


@pytest.mark.slow
def test_real_trainings_of_tiny_models(tmp_path: Path, asked: dict[str, Any]) -> None:
    cpu = {"use_cpu": True, "bf16": False, "max_steps": 2, "report_to": "none", "save_strategy": "no"}
    grpo = {"reward_funcs": ["test_excursions.by_checksum"], "num_generations": 4, "max_completion_length": 4}
    TASK.dataset(8, "prompt_completion").to_json(tmp_path / "solved.jsonl")
    data = {"dataset_name": str(tmp_path / "solved.jsonl")}
    mixing = {"plugins": ["parallel-averaging"], "streams": {"sft": str(tmp_path / "solved.jsonl")}}
    sft, rl = tmp_path / "sft.yaml", tmp_path / "rl.yaml"
    sft.write_text(yaml.safe_dump(cpu | data))
    rl.write_text(yaml.safe_dump(cpu | data | grpo | mixing | {"per_device_train_batch_size": 4}))
    del asked["launcher"]
    asked["checkpoints"] = asked["checkpoints"][:1]
    run(tmp_path, asked)
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["drift"]["value"] != 0 for row in rows[1:]] == [True, True]
    assert rows[1]["drift"]["value"] != rows[2]["drift"]["value"]
