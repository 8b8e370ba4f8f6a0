"""The `trl-ext` command. Help and listings answer at once: torch, TRL and plugins are imported only when needed."""

import sys
from collections.abc import Sequence
from typing import Any, Literal


def parse(kind: Literal["sft", "grpo"], arguments: Sequence[str]) -> tuple[Any, Any, Any, Any]:
    """Read a command line and its YAML as `trl-ext sft` and `trl-ext grpo` do; see `trl_ext.cli.train.parse`."""
    from trl_ext.cli import train

    return train.parse(kind, arguments)


def main() -> None:
    """Run the command line; an error in what was asked for ends with its message instead of a traceback."""
    from trl_ext.cli.app import app
    from trl_ext.errors import ConfigurationError

    try:
        app(prog_name="trl-ext")
    except ConfigurationError as error:
        # A ValueError is a refusal, and the message has its text; of anything else the traceback says where it is.
        if not isinstance(error.__cause__, ValueError | None):
            raise
        print(f"trl-ext: {error}", file=sys.stderr)
        sys.exit(2)
