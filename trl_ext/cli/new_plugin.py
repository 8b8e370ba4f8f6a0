"""`trl-ext new-plugin`: writes the project of a new plugin from the template beside this file."""

from __future__ import annotations

import keyword
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer

from trl_ext.errors import ConfigurationError

TEMPLATE = Path(__file__).parent / "template"
Kind = Literal["objective", "grpo", "gradient", "averaging", "probe", "diagnostic"]
Licence = Literal["Apache-2.0", "BSD-3-Clause", "MIT"]


def new_plugin(
    name: Annotated[str, typer.Argument(help="What a config will call it: lower case, with dashes.")],
    kind: Annotated[Kind | None, typer.Option(help="What it is.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the project; trl-ext-NAME if left out.")] = None,
    author: Annotated[str | None, typer.Option(help="Its authors.")] = None,
    licence: Annotated[Licence | None, typer.Option(help="Its licence.")] = None,
) -> None:
    """Write the project of a new plugin: code that runs, its tests, metadata and CI; asks for what is not given."""
    folder = output or Path(f"trl-ext-{name}")
    _refuse_name(name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(f"--output {folder} is there already, and not an empty folder; name another")
    given = {"name": name, "kind": kind, "author": author, "licence": licence}
    answers = {key: value for key, value in given.items() if value is not None}
    ask = len(answers) < len(given) and sys.stdin.isatty()
    if kind is None and not ask:
        raise ConfigurationError(f"--kind is not given; name one of {', '.join(get_args(Kind))}")
    _copier().run_copy(str(TEMPLATE), folder, data=answers, defaults=not ask, quiet=True)
    print(f"wrote {folder}. Next: cd {folder} && python -m pip install -e '.[dev]' && python -m pytest")


def _refuse_name(name: str) -> None:
    """Refuse what is no name of a plugin, or would name a module or class as Python does something else."""
    words = name.split("-")
    identifiers = ["_".join(words), "".join(word.capitalize() for word in words)]
    if not re.fullmatch("[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or any(map(keyword.iskeyword, identifiers)):
        raise ConfigurationError(f"{name!r} cannot be the name of a plugin's module and class; write it as my-plugin")


def _copier() -> Any:
    try:
        import copier
    except ImportError as error:
        raise ConfigurationError("new-plugin writes its project with copier") from error
    return copier
