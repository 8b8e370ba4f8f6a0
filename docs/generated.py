"""Sphinx extension: the parts of pages that are made from the installed package, so that they cannot go out of date.

A page asks for one with a comment, `<!-- generated: methods -->`.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

DOCS = Path(__file__).parent
MARKER = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)


def methods() -> str:
    """A table for each distribution: what its plugins do, when to take them, and what they cost."""
    advice = yaml.safe_load((DOCS / "methods" / "methods.yaml").read_text())
    return "\n\n".join(
        f"## {heading}\n\n{measured}\n\n{_table(METHOD_COLUMNS, rows)}"
        for heading, measured, rows in _methods_by_distribution(advice)
    )


METHOD_COLUMNS = ("method", "when", "when not", "trainers", "cost")


def _methods_by_distribution(advice: dict[str, Any]) -> Iterator[tuple[str, str, list[tuple[str, ...]]]]:
    from trl_ext.plugins.discovery import load_plugin

    points = sorted(metadata.entry_points(group="trl_ext"), key=lambda point: point.name)
    for distribution, about in advice.items():
        card = distribution.removeprefix("trl-ext-")
        rows = []
        for point in points:
            if point.dist is not None and point.dist.name == distribution:
                plugin, _ = load_plugin(point.name)
                rows.append(_method_row(point.name, plugin, about))
        yield f"[{distribution}]({card}.md)", f"[Measured here](../results/{card}.md): {about['measured']}.", rows


def _method_row(name: str, plugin: Any, about: dict[str, Any]) -> tuple[str, ...]:
    from trl_ext.plugins.declarations import read_declarations
    from trl_ext.records import trainer_name

    say = about["plugins"][name]
    trainers = read_declarations(plugin, name, name, name).trainers
    return (
        f"`{name}`: {_first_sentence(plugin)} {_linked(getattr(plugin, 'citation', ''))}",
        say["when"],
        say["when not"],
        ", ".join(trainer_name(trainer) for trainer in trainers),
        plugin.cost,
    )


def _first_sentence(documented: object) -> str:
    text = " ".join((inspect.getdoc(documented) or "").split("\n\n")[0].split())
    return text.replace("|", r"\|")


def _linked(citation: str) -> str:
    """The papers of a citation as links; its text where it names none."""
    papers = re.findall(r"\d{4}\.\d{4,5}", citation)
    return ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in papers) or citation


def trainers() -> str:
    """The hooks, and the trainers that call them."""
    from trl_ext.hookspecs import HOOKS
    from trl_ext.records import TRAINERS, trainer_name

    rows = [
        (f"`{hook}`", *("yes" if trainer in facts.trainers else "" for trainer in TRAINERS))
        for hook, facts in HOOKS.items()
    ]
    return _table(("hook", *map(trainer_name, TRAINERS)), rows)


def configuration() -> str:
    """The settings that all configs add to TRL's, from the metadata of their fields."""
    from trl_ext.config import _PluginSettings

    rows = [
        (f"`{field.name}`", f"`{field.default!r}`", field.metadata["help"])
        for field in dataclasses.fields(_PluginSettings)
    ]
    return _table(("key", "default", "meaning"), rows)


def commands() -> str:
    """Every command with its arguments and options, from typer."""
    import typer

    from trl_ext.cli.app import app

    return "\n\n".join(_command(typer.main.get_command(app), "trl-ext", None))


def _command(command: Any, path: str, parent: Any) -> Iterator[str]:
    context = command.make_context(path, [], parent, resilient_parsing=True)
    names = command.list_commands(context) if hasattr(command, "list_commands") else []
    command = context.command
    yield f"## `{path}`" if names else f"### `{path}`"
    yield inspect.cleandoc(command.help or "")
    rows = [
        (f"`{', '.join(parameter.opts)}`", _default(parameter), getattr(parameter, "help", "") or "")
        for parameter in command.get_params(context)
        if parameter.name != "help"
    ]
    if rows:
        yield _table(("argument or option", "default", "meaning"), rows)
    for name in names:
        yield from _command(command.get_command(context, name), f"{path} {name}", context)


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    return "" if parameter.default in (None, False, ()) else f"`{parameter.default}`"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(' '.join(str(cell).split()) for cell in line)} |" for line in lines)


def notebook(name: str) -> str:
    """A notebook of the examples: its texts, its code, and what it printed and drew when it was last run."""
    path = DOCS.parent / "examples" / "notebooks" / f"{name}.ipynb"
    return "\n\n".join(part for cell in json.loads(path.read_text())["cells"] for part in _cell(cell))


def _cell(cell: dict[str, Any]) -> Iterator[str]:
    source = "".join(cell["source"])
    yield f"```python\n{source}\n```" if cell["cell_type"] == "code" else source
    for output in cell.get("outputs", ()):
        if picture := output.get("data", {}).get("image/png"):
            yield f'<img alt="The plot of the cell above" src="data:image/png;base64,{picture.strip()}">'
        elif output["output_type"] == "stream" and output["name"] == "stdout":
            yield f"```text\n{''.join(output['text'])}```"


PARTS: dict[str, Callable[[], str]] = {
    "methods": methods,
    "trainers": trainers,
    "configuration": configuration,
    "commands": commands,
    "swap_an_objective": partial(notebook, "swap_an_objective"),
    "combine_and_compare": partial(notebook, "combine_and_compare"),
}


def fill(app: Any, docname: str, source: list[str]) -> None:
    source[0] = MARKER.sub(lambda match: PARTS[match[1]](), source[0])


def escape_bars(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Let `|g|` in docstrings be a norm: for reStructuredText bars are substitutions, outside of code."""
    lines[:] = [
        "".join(part if part.startswith("`") else part.replace("|", r"\|") for part in re.split(r"(`[^`]*`)", line))
        for line in lines
    ]


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", fill)
    app.connect("autodoc-process-docstring", escape_bars)
    return {"parallel_read_safe": True}
