"""The `trl-ext` command. Help and listings answer at once: torch, TRL and plugins are imported only when needed."""

import sys


def main() -> None:
    """Run the command line; an error in what was asked for ends with its message instead of a traceback."""
    from trl_ext.cli.app import app
    from trl_ext.errors import ConfigurationError

    try:
        app(prog_name="trl-ext")
    except ConfigurationError as error:
        if error.__cause__ is not None:  # the plugin's own traceback says where
            raise
        print(f"trl-ext: {error}", file=sys.stderr)
        sys.exit(2)
