"""How a command ends: with its result, with one line about what its user can mend, or with a traceback."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import typer

from trl_ext.errors import OnAllRanksError, PluginError, TrlExtError
from trl_ext.jobs import SAID

DEBUG = "TRL_EXT_DEBUG"
"""Set for `--debug`: in the environment, so that the ranks that a launcher starts show their tracebacks too."""
USER_FAULT = 2
INTERRUPTED = 130
UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""What typer raises for arguments that it cannot read; the class itself has no public name."""


def run_to_the_end(app: Any, arguments: Sequence[str], kinds: Sequence[str]) -> int:
    """Run a command line, and end it as its user can use.

    Args:
        app: The commands, of typer.
        arguments: Those of `trl-ext`.
        kinds: The training commands, which hand most of their arguments to TRL.

    Returns:
        The exit code: 2 for what the user can mend. A bug leaves as the exception that it is.
    """
    arguments = _take_debug(arguments, kinds)
    try:
        result = app(arguments, prog_name="trl-ext", standalone_mode=False)
    except TrlExtError as error:
        if not _is_user_s(error):
            raise
        return _refuse(error)
    except UsageError as error:
        return _refuse_usage(error)
    except typer.Abort:
        return INTERRUPTED
    return result if isinstance(result, int) else 0


def say(line: str) -> None:
    """Print one line about the command itself, apart from its results, and not behind a progress bar."""
    text = f"{SAID}{' '.join(line.split())}"
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(text, file=sys.stderr)
    else:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def held_warnings() -> Iterator[None]:
    """A context whose warnings come at its end: an error comes alone."""
    with warnings.catch_warnings(record=True) as caught:
        yield
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _take_debug(arguments: Sequence[str], kinds: Sequence[str]) -> list[str]:
    """Leave out our `--debug`, wherever it stands before a script and its arguments.

    TRL's own `--debug` of the training commands has a value, and stays.
    """
    command = next((text for text in arguments if not text.startswith("-")), None)
    end = _place_of_script(arguments) if command == "run" else len(arguments)
    kept = []
    for i, text in enumerate(arguments):
        value = arguments[i + 1 : i + 2]
        trl_s = command in kinds and i > arguments.index(command) and value and not value[0].startswith("-")
        if text == "--debug" and i < end and not trl_s:
            os.environ[DEBUG] = "1"
        else:
            kept.append(text)
    return kept


def _place_of_script(arguments: Sequence[str]) -> int:
    """Where the script of `run` stands, behind the options of `run` itself."""
    place = arguments.index("run") + 1
    while place < len(arguments) and arguments[place].startswith("-"):
        place += 1 if arguments[place] in ("--debug", "--help", "-h") or "=" in arguments[place] else 2
    return place


def _is_user_s(error: TrlExtError) -> bool:
    """Whether the message says all. A plugin's hook or import that fails is a bug: its traceback shows the place."""
    cause = error.__cause__
    if isinstance(error, PluginError | OnAllRanksError):
        return False
    return cause is None or isinstance(cause, ValueError | TrlExtError) or _not_installed(cause) is not None


def _not_installed(error: BaseException | None) -> str | None:
    """The package whose absence an ImportError comes down to."""
    while isinstance(error, ImportError):
        if isinstance(error, ModuleNotFoundError) and error.name and find_spec(error.name.split(".")[0]) is None:
            return error.name.split(".")[0]
        error = error.__cause__ or error.__context__
    return None


def _refuse(error: TrlExtError) -> int:
    if os.environ.get(DEBUG):
        _show_all(error)
    package = _not_installed(error.__cause__)
    if package is not None:
        from trl_ext.cli.installing import how_to_install

        error.add_note(how_to_install(package))
    rank = f"[rank {os.environ['RANK']}] " if os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ else ""
    say(rank + ". ".join([str(error).rstrip("."), *getattr(error, "__notes__", ())]))
    return USER_FAULT


def _show_all(error: BaseException) -> None:
    """Print the traceback with the errors that ours stands for."""
    link: BaseException | None = error
    while link is not None:
        link.__suppress_context__ = False
        link = link.__context__
    traceback.print_exception(error)


def _refuse_usage(error: Any) -> int:
    """What typer says about arguments, as one line; a command group without a command shows its help."""
    message = error.format_message().strip()
    if message.startswith("Usage:"):
        print(message, file=sys.stderr)
    else:
        message += "" if message[-1] in ".?" else "."
        say(f"{message} See {error.ctx.command_path if error.ctx else 'trl-ext'} --help")
    return USER_FAULT
