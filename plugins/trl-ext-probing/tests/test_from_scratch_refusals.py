"""`trl-ext probe from-scratch` refuses what cannot work, by the option's name and before a model loads."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scratch_runs import prepare
from transformers import PreTrainedModel
from trl_ext_probing.answers import exact_text
from trl_ext_probing.from_scratch.control import run
from trl_ext_probing.from_scratch.control_settings import EXACT, FromScratchSettings
from trl_ext_probing.from_scratch.evaluating import load_set
from trl_ext_probing.from_scratch.procedure import Procedure

from trl_ext.cli import main
from trl_ext.errors import ConfigurationError


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> FromScratchSettings:
    return prepare(tmp_path_factory.mktemp("data"))


NO_ANSWER = '{"prompt": "1+1="}\n'


@pytest.mark.parametrize(
    ("change", "yaml", "message"),
    [
        ({"config": "none.yaml"}, "", r"--config: there is no file 'none.yaml'"),
        ({"eval_in": None, "eval_out": None}, "", "nothing to evaluate on: give --eval-in, --eval-out or both"),
        ({"seeds": 2}, "", "--seeds 2: at least 3"),
        ({"reward": ["scratch_runs:nothing"]}, "", "--reward 'scratch_runs:nothing' .* no attribute 'nothing'"),
        (
            {"reward": ["trl_ext_probing.answers:exact_answer"], "columns": "answer=solution"},
            "",
            "--eval-in: .* answer,",
        ),
        ({"learning_rates": "1e-3", "lr_multipliers": "1"}, "", "--learning-rates and --lr-multipliers contradict"),
        ({"learning_rates": "fast"}, "", "--learning-rates 'fast': numbers with commas"),
        ({"learning_rates": None, "lr_multipliers": "0,1"}, "", "--lr-multipliers '0,1': learning rates are above 0"),
        ({"eval_in": None}, "", "chosen by validation nll: give --validation or --eval-in"),
        ({"eval_out": "none.jsonl"}, "", "--eval-out: .* there is no file 'none.jsonl'"),
        ({"eval_in": "prompts.jsonl"}, "", "--eval-in: rows without 'completion' have no nll"),
        ({"eval_out": "empty.jsonl"}, "", "--eval-out: .*empty.jsonl.* is empty"),
        ({"columns": "prompt=question"}, "", r"--eval-in: .* has no column 'prompt' \(there are question"),
        ({"floor": "median"}, "", "--floor: 'median' is not majority, format or a number"),
        ({"n": 4, "temperature": 0.0}, "", "--n 4 with --temperature 0: greedy completions are all the same"),
        ({"search_seeds": 4}, "", "--search-seeds 4: from 1 to --seeds 3"),
        ({"search_share": 0.0}, "", "--search-share 0: above 0"),
        ({"confidence": 1.0}, "", "--confidence 1: between 0 and 1"),
        ({"points": 0}, "", "--points 0: at least 1"),
        ({"engine": "vllm"}, "", "--engine vllm: this probe evaluates its models in its own process"),
        ({}, "use_peft: true", "use_peft trains an adapter .*set use_peft: false"),
        ({}, "load_in_4bit: true", "load_in_4bit trains"),
        ({}, "dataset_streaming: true", "do not stream it"),
        ({}, "resume_from_checkpoint: x", "resume_from_checkpoint is this probe's own"),
        ({}, "model_name_or_path: none", "model_name_or_path: 'none' has no configuration"),
        ({}, "model_name_or_path: null", "model_name_or_path is missing"),
        ({}, "plugins: [no-such-plugin]", "no-such-plugin"),
    ],
)
def test_refused_before_a_model_loads(
    settings: FromScratchSettings,
    tmp_path: Path,
    change: dict[str, Any],
    yaml: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loads(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a model loads")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", loads)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text(NO_ANSWER)
    Path("empty.jsonl").write_text("")
    Path("changed.yaml").write_text(
        "".join(
            line + "\n"
            for line in Path(settings.config).read_text().splitlines()
            if line.partition(":")[0] != yaml.partition(":")[0]
        )
        + yaml
    )
    config = "changed.yaml" if yaml else settings.config
    with pytest.raises(ConfigurationError, match=message):
        run(replace(settings, **{"config": config, "output": tmp_path / "out", **change}))
    assert not (tmp_path / "out").exists()


def test_the_command_ends_with_the_message(
    settings: FromScratchSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["trl-ext", "probe", "from-scratch", "--config", settings.config, "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*command, "--eval-in", "none.jsonl"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "trl-ext: --eval-in: data set: there is no file 'none.jsonl'." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(
    settings: FromScratchSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match="runs in one process"):
        Procedure(replace(settings, output=tmp_path))


def test_built_in_reward_compares_with_the_answer_or_the_completion(
    settings: FromScratchSettings, tmp_path: Path
) -> None:
    plain = replace(settings, reward=[EXACT])
    (tmp_path / "set.jsonl").write_text('{"prompt": "1+1=", "completion": " 2"}\n')
    rows = load_set(plain, "--eval-in", str(tmp_path / "set.jsonl"))
    assert exact_text(["2"], [row["answer"] for row in rows]) == [1]
    (tmp_path / "set.jsonl").write_text(NO_ANSWER)
    with pytest.raises(ConfigurationError, match="neither 'answer' nor 'completion', which the built-in reward"):
        load_set(plain, "--eval-out", str(tmp_path / "set.jsonl"))
