"""Settings of probes: the command line and the Python call are one, and an interruption says how to go on."""

from __future__ import annotations

import inspect
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import pytest
import typer
from trl_ext_probing import commands
from trl_ext_probing.capability.capability_settings import CapabilitySettings
from trl_ext_probing.passk.passk_settings import PasskSettings
from trl_ext_probing.settings import probe
from typer.testing import CliRunner

from trl_ext.errors import ConfigurationError

SETTINGS = PasskSettings(
    model=["a", "b with blanks"],
    dataset="d.jsonl",
    reward=["m:f", "n.py:g"],
    reward_weights="1,0.5",
    n=3,
    k="1,3",
    limit=7,
    overwrite=True,
    output=Path("out put"),
)


def parsed(arguments: list[str], cls: type = PasskSettings) -> tuple[list[Any], Any]:
    """The settings that a command line gives, if any, and how it ended."""
    seen: list[Any] = []

    def capture(settings: Any) -> None:
        seen.append(settings)

    capture.__annotations__["settings"] = cls
    app = typer.Typer()
    app.command()(probe(capture))
    return seen, CliRunner().invoke(app, arguments)


FLAGS = [CapabilitySettings(model=["a"], dataset="d", completion_only=flag) for flag in (True, False, None)]


@pytest.mark.parametrize("settings", [SETTINGS, *FLAGS])
def test_the_command_of_settings_gives_them_again(settings: Any) -> None:
    words = shlex.split(settings.command)
    assert words[:3] == ["trl-ext", "probe", settings.probe]
    assert "--overwrite" not in words, "to go on is not to begin anew"
    seen, done = parsed([*words[3:], *["--overwrite"] * settings.overwrite], type(settings))
    assert done.exit_code == 0, done.output
    assert seen == [settings]


def test_what_the_command_line_refuses_a_call_refuses() -> None:
    words = shlex.split(SETTINGS.command)[3:]
    for option, value in (("n", 0), ("top_p", 1.5), ("dtype", "bf16"), ("engine", "jax"), ("limit", 0)):
        seen, done = parsed([*words, f"--{option.replace('_', '-')}", str(value)])
        assert done.exit_code == 2, option
        assert not seen
        given = {f.name: getattr(SETTINGS, f.name) for f in fields(SETTINGS)}
        with pytest.raises(ConfigurationError, match=f"^--{option.replace('_', '-')} "):
            PasskSettings(**given | {option: value})


VOCABULARY: dict[str, Any] = {
    "model": list[str],
    "dataset": str,
    "dataset_config": str | None,
    "split": str,
    "columns": str | None,
    "limit": int | None,
    "output": Path,
    "overwrite": bool,
    "confidence": float,
    "reward": list[str],
    "reward_weights": str | None,
    "solved_at": float,
    "engine": Literal["transformers", "server", "vllm"],
    "base_url": list[str] | None,
    "n": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "max_completion_length": int,
    "max_length": int,
    "batch_size": int,
    "batch_tokens": int,
    "seed": int,
    "dtype": Literal["auto", "float32", "bfloat16", "float16"],
    "device": str,
}
"""Options that mean the same wherever they are, with the type of their values."""
SHARED = {"output", "overwrite", "confidence"}
SAMPLING = {"engine", "base_url", "n", "temperature", "top_p", "top_k", "max_completion_length", "batch_size", "seed"}
SCORING = {"dataset", "split", "columns", "limit", "max_length", "batch_tokens", "dtype", "device", "model"}
PROBES = {
    commands.capability: SHARED | SCORING,
    commands.drift: SHARED | SCORING,
    commands.excursions: SHARED,
    commands.from_scratch: SHARED | SAMPLING | {"reward", "reward_weights", "split", "columns"},
    commands.passk: SHARED | SAMPLING | {"model", "dataset", "limit", "reward", "reward_weights", "solved_at"},
    commands.reachability: SHARED | SAMPLING | {"model", "dataset", "limit", "reward", "reward_weights", "solved_at"},
}
OTHER_NAMES = {
    "max_new_tokens", "rollouts", "samples", "success", "dataset_name", "eval_batch_size", "output_dir", "metric",
    "reward_funcs", "top", "url", "num_samples", "threshold", "level",
}  # fmt: skip


@pytest.mark.parametrize("command", PROBES, ids=lambda command: command.__name__)
def test_all_probes_speak_one_vocabulary(command: Any) -> None:
    """The same name has the same type everywhere, and no option of another name means the same."""
    parameters = inspect.signature(command).parameters
    assert PROBES[command] <= set(parameters)
    assert not OTHER_NAMES & set(parameters)
    for name in VOCABULARY.keys() & parameters.keys():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert get_args(parameters[name].annotation)[0] == VOCABULARY[name], name


def test_one_name_stands_for_a_list_of_one() -> None:
    assert PasskSettings(model="a", dataset="d", reward="m:f").model == ["a"]  # type: ignore[arg-type]


def test_an_interruption_ends_with_the_command_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Stopped(PasskSettings):
        probe: ClassVar[str] = "passk"

    def stopped(settings: Any) -> None:
        raise KeyboardInterrupt

    stopped.__annotations__["settings"] = Stopped
    with pytest.raises(typer.Exit) as end:
        probe(stopped)(model=["a"], dataset="d", reward=["m:f"])
    assert end.value.exit_code == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("trl-ext probe passk --reward m:f --dataset d --model a")
