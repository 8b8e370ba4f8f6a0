"""`trl-ext plugins list|info|check`."""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from trl_ext.plugins.discovery import PluginInfo

plugins_app = typer.Typer(help="Show and check the installed plugins.", no_args_is_help=True)


@plugins_app.command("list")
def list_command(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the installed plugins, without importing them."""
    from trl_ext.cli.listing import list_plugins

    gc.disable()  # the sources' syntax trees are many small objects, and the process is about to end
    infos = list_plugins()
    if as_json:
        print(json.dumps([dataclasses.asdict(info) for info in infos], indent=2))
        return
    if not infos:
        print("No plugins are installed. Distributions with plugins are called trl-ext-<topic>.")
        return
    rows = [
        (info.name, f"{info.distribution} {info.version}", f"BROKEN: {info.error}" if info.error else info.summary)
        for info in infos
    ]
    _print_table(("plugin", "distribution", "about"), rows)


@plugins_app.command()
def info(
    plugin: Annotated[str, typer.Argument(help="Its name, or with options as in a config: power:alpha=10.")],
    draw: Annotated[Path | None, typer.Option(help="Draw what it does, with these options, into this image.")] = None,
    as_bibtex: Annotated[bool, typer.Option("--bibtex", help="Print its source as BibTeX.")] = False,
) -> None:
    """Show a plugin's options, hooks, trainers and citation; imports it."""
    from trl_ext.errors import ConfigurationError
    from trl_ext.plugins.activation import from_spec
    from trl_ext.plugins.discovery import load_plugin
    from trl_ext.specs import parse_one

    spec = parse_one(plugin)
    name = spec["name"]
    plugin_class, found = load_plugin(name)
    if as_bibtex:
        _print_bibtex(name, plugin_class)
        return
    active = from_spec(spec) if draw or len(spec) > 1 else None
    if draw and active:
        if not hasattr(active.instance, "draw"):
            raise ConfigurationError(f"plugin {active} has nothing to draw; leave out --draw")
        active.instance.draw(draw)
        print(f"wrote {draw}")
        return
    print(f"{name} ({found.distribution} {found.version}), {found.value}\n")
    print(*_describe(plugin_class, found), sep="\n")
    if options := _options(plugin_class):
        print("\nOptions:")
        header: tuple[str, ...] = ("option", "type", "default")
        if active is not None:
            header += ("here",)
            options = [(*option, repr(active.options[option[0]])) for option in options]
        _print_table(header, options)
    else:
        print("\nIt has no options.")


@plugins_app.command()
def check(
    name: Annotated[
        str | None, typer.Argument(help="The plugin's name, with --run also its options; all if left out.")
    ] = None,
    run: Annotated[
        bool, typer.Option("--run", help="Run the conformance kit on it: tiny trainings on the CPU, a minute or two.")
    ] = False,
) -> None:
    """Import and validate plugins; exit with 1 if any is BROKEN, or fails a case."""
    if run:
        _run_cases(name)
        return
    from trl_ext.cli.listing import list_plugins
    from trl_ext.errors import ConfigurationError
    from trl_ext.plugins.activation import check_plugin

    failures = 0
    for plugin in [name] if name else sorted({info.name for info in list_plugins()}):
        try:
            check_plugin(plugin)
        except ConfigurationError as error:
            failures += 1
            print(f"BROKEN  {plugin}: {error}")
        else:
            print(f"ok      {plugin}")
    if failures:
        raise typer.Exit(1)


def _run_cases(name: str | None) -> None:
    from trl_ext.cli.conformance import run_cases
    from trl_ext.errors import ConfigurationError

    if name is None:
        raise ConfigurationError("--run takes the name of one plugin: trl-ext plugins check --run NAME")
    rows = []
    for trainer, case, outcome in run_cases(name):
        print(f"{trainer}: {case} {outcome.verdict}", file=sys.stderr, flush=True)
        rows.append((trainer, case, outcome.verdict, outcome.remark.partition("\n")[0]))
    _print_table(("trainer", "case", "verdict", "remark"), rows)
    if any(verdict == "FAILED" for _, _, verdict, _ in rows):
        raise typer.Exit(1)


def _print_bibtex(name: str, plugin_class: type) -> None:
    from trl_ext.cli.bibtex import bibtex
    from trl_ext.errors import ConfigurationError

    citation = getattr(plugin_class, "citation", "")
    if not citation:
        raise ConfigurationError(f"plugin {name} declares no citation; leave out --bibtex")
    print(bibtex(name, citation))


def _describe(plugin_class: type, info: PluginInfo) -> list[str]:
    import inspect

    from trl_ext.plugins.declarations import read_declarations
    from trl_ext.plugins.implementations import marked_hooks
    from trl_ext.specs import config_line

    declared = read_declarations(plugin_class, info.name, str(info), config_line({"name": info.name}))
    facts = {
        "Trainers": ", ".join(declared.trainers),
        "Cost": getattr(plugin_class, "cost", ""),
        "Provides": ", ".join(declared.provides[1:]),
        "Conflicts with": "; ".join(f"{word} ({reason})" for word, reason in declared.conflicts.items()),
        "Comes after": "; ".join(f"{word} ({reason})" for word, reason in declared.after.items()),
        "Hooks": ", ".join(marked_hooks(plugin_class)),
        "Needs": ", ".join(
            f"{what} {wanted}"
            for what, wanted in (
                ("plugin API", getattr(plugin_class, "requires_api", None)),
                ("TRL", getattr(plugin_class, "requires_trl", None)),
            )
            if wanted
        ),
        "Citation": getattr(plugin_class, "citation", ""),
    }
    return [inspect.getdoc(plugin_class) or "", "", *(f"{key}: {value}" for key, value in facts.items() if value)]


def _options(plugin_class: type) -> list[tuple[str, ...]]:
    from trl_ext.options import option_fields, option_type
    from trl_ext.plugins.coercion import type_name

    return [
        (name, type_name(option_type(plugin_class, name)), _default(field))
        for name, field in option_fields(plugin_class).items()
    ]


def _default(field: dataclasses.Field[Any]) -> str:
    from trl_ext.plugins.written_options import default_of

    default = default_of(field, missing=...)
    return "required" if default is ... else repr(default)


def _print_table(header: tuple[str, ...], rows: Iterable[Sequence[str]]) -> None:
    """Print a table: wrapped and coloured on a terminal, one line a row where another program reads it."""
    if not sys.stdout.isatty():
        lines = [header, *rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        for line in lines:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(Text(cell, style="red" if cell.startswith("BROKEN") else "") for cell in row))
    Console().print(table)
