"""`trl-ext sft`, `trl-ext grpo` and `trl-ext run`: TRL's own scripts and other people's, with our trainers in place."""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from trl_ext.cli.patching import patch_trl
from trl_ext.data import FILE_FORMATS
from trl_ext.errors import ConfigurationError
from trl_ext.plugins.activation import activate
from trl_ext.specs import PLUGINS_VARIABLE, parse_specs


def train(kind: Literal["sft", "grpo"], arguments: Sequence[str]) -> None:
    """Run TRL's training script with its own parser.

    Args:
        kind: Which one.
        arguments: The command line after `trl-ext sft`.

    Raises:
        ConfigurationError: The plugins or the data file cannot be used; before any data or model loads.
    """
    parsed = parse(kind, arguments)
    import_module(f"trl.scripts.{kind}").main(*parsed)


def parse(kind: Literal["sft", "grpo"], arguments: Sequence[str]) -> tuple[Any, Any, Any, Any]:
    """Read a command line and its YAML as `train` does, with our classes under TRL's names from here on.

    Returns:
        The script's, the trainer's, the model's and the data's settings, which the `main` of TRL's script takes.

    Raises:
        ConfigurationError: The plugins or the data file cannot be used.
    """
    patch_trl()
    parser = import_module(f"trl.scripts.{kind}").make_parser(prog=f"trl-ext {kind}")
    # TRL's scripts ignore YAML keys that they do not know, a misspelt `plugins` too; the parser's default refuses them.
    script_args, training_args, model_args, dataset_args = parser.parse_args_and_config(arguments)
    activate(training_args.plugins, trainer=kind)  # as the trainer will, but before the data loads
    _take_local_file(script_args, dataset_args)
    return script_args, training_args, model_args, dataset_args


def run_script(script: Path, arguments: Sequence[str], plugins: Sequence[str] | None = None) -> None:
    """Run a script as `python script.py ...` would, with our trainers under TRL's names.

    Args:
        script: The file.
        arguments: Its `sys.argv[1:]`.
        plugins: For every config that names none itself; None leaves `TRL_EXT_PLUGINS` as it is.

    Raises:
        ConfigurationError: There is no such file, or the plugins cannot be read.
    """
    if not script.is_file():
        raise ConfigurationError(f"trl-ext run: there is no file {str(script)!r}")
    if plugins is not None:
        os.environ[PLUGINS_VARIABLE] = json.dumps(parse_specs(list(plugins)))
    patch_trl()
    sys.argv = [str(script), *arguments]
    sys.path[0] = str(script.resolve().parent)
    runpy.run_path(str(script), run_name="__main__")


def _take_local_file(script_args: Any, dataset_args: Any) -> None:
    """Let `--dataset_name` be a data file, which TRL's scripts would look for on the hub."""
    from trl.scripts.utils import DatasetConfig

    path = Path(script_args.dataset_name or "").expanduser()
    builder = FILE_FORMATS.get(path.suffix.lower())
    if builder is None or dataset_args.datasets:
        return
    if not path.is_file():
        raise ConfigurationError(f"--dataset_name: there is no file {str(path)!r}")
    dataset_args.datasets = [DatasetConfig(path=builder, data_files=str(path))]
    dataset_args.streaming = dataset_args.streaming or script_args.dataset_streaming
    script_args.dataset_name = None
