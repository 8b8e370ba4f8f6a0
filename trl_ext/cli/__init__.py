"""The `trl-ext` command. Help and listings answer at once: torch, TRL and plugins are imported only when needed."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_ext.records import TrainerKind


def parse(kind: "TrainerKind", arguments: Sequence[str]) -> tuple[Any, Any, Any, Any]:
    """Read a command line and its YAML as the training commands do; see `trl_ext.cli.train.parse`."""
    from trl_ext.cli import train

    return train.parse(kind, arguments)


def check(kind: "TrainerKind", arguments: Sequence[str]) -> tuple[Any, Any, Any, Any]:
    """Read a command line as `parse` does, and refuse what can be known to fail before a model loads.

    Raises:
        ConfigurationError: With the setting to change.
    """
    from trl_ext.cli import train

    settings, _, _ = train.read(kind, arguments)
    train.check(kind, settings)
    return settings


def read_yaml(path: Path, setting: str) -> dict[str, Any]:
    """The content of a YAML file of settings, for the commands of a distribution too.

    Args:
        path: the file.
        setting: what names it, such as "--config", for messages.

    Raises:
        ConfigurationError: There is no such file, it is not YAML or not a mapping of settings, or a key is there twice.
    """
    from trl_ext.cli import yaml_files

    return yaml_files.read_yaml(path, setting)


def main() -> None:
    """Run the command line; what its user can mend ends with one line and exit code 2 instead of a traceback."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run `trl-ext` with these arguments, and give its exit code."""
    from trl_ext.cli.app import KINDS, app
    from trl_ext.cli.ending import run_to_the_end

    return run_to_the_end(app, arguments, KINDS)
