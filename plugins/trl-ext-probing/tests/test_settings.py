"""Settings of probes: the command line and the Python call are one, and an interruption says how to go on."""

from __future__ import annotations

import inspect
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import pytest
import typer
from trl_ext_probing import commands
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
PROBES = [commands.capability, commands.drift, commands.excursions, commands.from_scratch, commands.passk,
          commands.reachability]  # fmt: skip


def parsed(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[list[PasskSettings], Any]:
    seen: list[PasskSettings] = []

    @probe
    def capture(settings: PasskSettings) -> None:
        seen.append(settings)

    app = typer.Typer()
    app.command()(capture)
    return seen, CliRunner().invoke(app, arguments)


def test_the_command_of_settings_gives_them_again(monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(SETTINGS.command)
    assert words[:3] == ["trl-ext", "probe", "passk"]
    assert "--overwrite" not in words, "to go on is not to begin anew"
    seen, done = parsed([*words[3:], "--overwrite"], monkeypatch)
    assert done.exit_code == 0, done.output
    assert seen == [SETTINGS]


def test_what_the_command_line_refuses_a_call_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(SETTINGS.command)[3:]
    for option, value in (("n", 0), ("top_p", 1.5), ("dtype", "bf16"), ("engine", "jax"), ("limit", 0)):
        seen, done = parsed([*words, f"--{option.replace('_', '-')}", str(value)], monkeypatch)
        assert done.exit_code == 2, option
        assert not seen
        given = {f.name: getattr(SETTINGS, f.name) for f in fields(SETTINGS)}
        with pytest.raises(ConfigurationError, match=f"^--{option.replace('_', '-')} "):
            PasskSettings(**given | {option: value})


@pytest.mark.parametrize("command", PROBES, ids=lambda command: command.__name__)
def test_all_probes_speak_one_vocabulary(command: Any) -> None:
    """The same name has the same type everywhere, and no option of another name means the same."""
    common = {f.name: f.type for f in fields(PasskSettings)}
    parameters = inspect.signature(command).parameters
    assert {"output", "overwrite", "confidence"} <= set(parameters)
    for other in ("max_new_tokens", "rollouts", "samples", "success", "dataset_name", "eval_batch_size", "output_dir"):
        assert other not in parameters
    for name in common.keys() & parameters.keys():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY


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
