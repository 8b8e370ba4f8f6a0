"""The `trl-ext` command. Help and listings answer at once: torch, TRL and plugins are imported only when needed."""

import sys


def main() -> None:
    """Run the command line; what its user can mend ends with one line and exit code 2 instead of a traceback."""
    from trl_ext.cli.ending import run_command

    sys.exit(run_command(sys.argv[1:]))
