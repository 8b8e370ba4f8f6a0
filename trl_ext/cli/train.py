"""The training commands and `trl-ext run`: TRL's own scripts and other people's, with our trainers in place."""

from __future__ import annotations

import json
import os
import runpy
import shlex
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

from trl_ext.cli.ending import INTERRUPTED, held_warnings, say
from trl_ext.errors import ConfigurationError, TrlExtError
from trl_ext.jobs import tie_where_asked
from trl_ext.records import TrainerKind
from trl_ext.specs import PLUGINS_VARIABLE, parse_specs

Settings = tuple[Any, Any, Any, Any]
"""The script's, the trainer's, the model's and the data's settings, which the `main` of TRL's script takes."""


def train(kind: TrainerKind, arguments: Sequence[str]) -> None:
    """Run TRL's training script with its own parser.

    Args:
        kind: Which one.
        arguments: The command line after `trl-ext sft`.

    Raises:
        ConfigurationError: What was asked for cannot work; before the model loads wherever that can be known.
        typer.Exit: With an exit code other than 0, after an interrupt or a launch that failed.
    """
    tie_where_asked()
    announce(kind)
    import torch

    from trl_ext.cli.faults import explain_faults
    from trl_ext.cli.launching import launch

    with held_warnings():
        settings, launch_args, rest = read(kind, arguments)
        check(kind, settings)
    if launch_args:
        on_cpu = settings[1].use_cpu or not torch.accelerator.is_available()
        raise typer.Exit(launch(kind, launch_args, rest, on_cpu))
    try:
        with explain_faults(settings[1], settings[2]):
            import_module(f"trl.scripts.{kind}").main(*settings)
    except KeyboardInterrupt:
        say(how_to_resume(kind, arguments, settings[1]))
        raise typer.Exit(INTERRUPTED) from None


def announce(what: str) -> None:
    """Say at once what runs: loading torch, transformers and TRL takes seconds."""
    if os.environ.get("RANK", "0") == "0":
        print(f"trl-ext {what}: loading torch, transformers and TRL", flush=True)


def parse(kind: TrainerKind, arguments: Sequence[str]) -> Settings:
    """Read a command line and its YAML as `train` does, with our classes under TRL's names from here on.

    Raises:
        ConfigurationError: A setting is unknown or of the wrong type, or the plugins or the data file cannot be used.
    """
    from trl_ext.plugins import activate

    settings, _, _ = read(kind, arguments)
    activate(settings[1].plugins, trainer=kind)  # as the trainer will, but before the data loads
    return settings


def read(kind: TrainerKind, arguments: Sequence[str]) -> tuple[Settings, list[str], list[str]]:
    """Read a command line and its YAML.

    Returns:
        TRL's settings; the flags of a launch, where one is asked for; and the command line without these.

    Raises:
        ConfigurationError: A setting is unknown or of the wrong type.
    """
    from trl_ext.cli.launching import is_launched, launch_flags
    from trl_ext.cli.settings import in_two_words, read_command_line, refuse_unknown

    arguments = in_two_words(arguments)
    parser = make_parser(kind)
    line = read_command_line(parser, arguments)
    launch_args: list[str] = []
    if line.unknown():
        refuse_unknown(line.unknown(), parser, launch_flags(), arguments)
        if line.flags_rest and is_launched():
            raise ConfigurationError(f"{line.flags_rest[0]}: a launcher has started this process; tell the launcher")
        launch_args = [] if is_launched() else [*line.config_rest, *line.flags_rest]
    settings: Settings = line.settings
    _take_local_file(settings[0], settings[3])
    if settings[2].model_name_or_path:
        settings[2].model_name_or_path = os.path.expanduser(settings[2].model_name_or_path)
    return settings, launch_args, _without(arguments, line.flags_rest)


def make_parser(kind: TrainerKind) -> Any:
    """TRL's parser of a training script, with our classes under TRL's names from here on."""
    from trl_ext.cli.patching import patch_trl

    patch_trl()
    return import_module(f"trl.scripts.{kind}").make_parser(prog=f"trl-ext {kind}")


def check(kind: TrainerKind, settings: Settings) -> None:
    """Refuse what can be known to fail before the model loads.

    Raises:
        ConfigurationError: With the setting to change.
    """
    from trl_ext.cli.preflight import check_settings
    from trl_ext.plugins import activate

    activate(settings[1].plugins, trainer=kind)  # as the trainer will
    check_settings(kind, *settings)


def how_to_resume(kind: TrainerKind, arguments: Sequence[str], training_args: Any) -> str:
    """What to type after an interrupt."""
    from trl_ext.checkpoints import newest_complete

    newest, _ = newest_complete(Path(training_args.output_dir), training_args.save_only_model)
    if newest is None:
        return f"interrupted before the first checkpoint (save_steps={training_args.save_steps:g}): run it again"
    again = shlex.join(["trl-ext", kind, *arguments])
    return f"interrupted; to go on from {newest}: {again} --resume_from_checkpoint true"


def run_script(script: Path, arguments: Sequence[str], plugins: Sequence[str] | None = None) -> None:
    """Run a script as `python script.py ...` would, with our trainers under TRL's names.

    Args:
        script: The file.
        arguments: Its `sys.argv[1:]`.
        plugins: For every config that names none itself; None leaves `TRL_EXT_PLUGINS` as it is.

    Raises:
        ConfigurationError: There is no such file, or the plugins cannot be read; what the script's own run refuses
            carries a note of the line in the script.
    """
    from trl_ext.cli.patching import patch_trl

    if not script.is_file():
        from trl_ext.data import nearest_path

        raise ConfigurationError(f"run: there is no file {str(script)!r}. {nearest_path(script)}".rstrip())
    if plugins is not None:
        os.environ[PLUGINS_VARIABLE] = json.dumps(parse_specs(list(plugins)))
    announce(f"run {script}")
    patch_trl()
    sys.argv = [str(script), *arguments]
    sys.path[0] = str(script.resolve().parent)
    try:
        runpy.run_path(str(script), run_name="__main__")
    except TrlExtError as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(script)]
        error.add_note(f"See {script}, line {lines[-1]}" if lines else f"See {script}")
        raise


def _without(arguments: Sequence[str], taken: Sequence[str]) -> list[str]:
    """The arguments without those that were taken out of them, in order."""
    rest, left = [], list(taken)
    for text in arguments:
        if left and text == left[0]:
            left.pop(0)
        else:
            rest.append(text)
    return rest


def _take_local_file(script_args: Any, dataset_args: Any) -> None:
    """Let `--dataset_name` be a data file, which TRL's scripts would look for on the hub."""
    from trl.scripts.utils import DatasetConfig

    from trl_ext.data import FILE_FORMATS, refuse_missing_file

    path = Path(script_args.dataset_name or "").expanduser()
    builder = FILE_FORMATS.get(path.suffix.lower())
    if builder is None or dataset_args.datasets:
        return
    refuse_missing_file(path, "dataset_name")
    dataset_args.datasets = [DatasetConfig(path=builder, data_files=str(path))]
    dataset_args.streaming = dataset_args.streaming or script_args.dataset_streaming
    script_args.dataset_name = None
