"""Commands that plugin distributions bring: listed from metadata, imported only when invoked."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from trl_ext.errors import ConfigurationError
from trl_ext.plugins.sources import SourceInspector, StaticError


def contributed_group(entry_point_group: str) -> type[TyperGroup]:
    """A command group that adds, to its own commands, one for each entry point: a function with typer's annotations."""

    class ContributedGroup(TyperGroup):
        def list_commands(self, ctx: Any) -> list[str]:
            return [*self.commands, *sorted(metadata.entry_points(group=entry_point_group).names - set(self.commands))]

        def get_command(self, ctx: Any, name: str) -> Any:
            if name in self.commands:
                return self.commands[name]
            claimed = tuple(sorted(metadata.entry_points(group=entry_point_group, name=name), key=_origin))
            return _LazyCommand(name, claimed) if claimed else None

    return ContributedGroup


class _LazyCommand(TyperCommand):
    """Stands for a contributed command in listings, and becomes it when it is invoked."""

    def __init__(self, name: str, claimed: tuple[metadata.EntryPoint, ...]) -> None:
        super().__init__(name, callback=None, help=_summary(claimed))
        self.claimed = claimed

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return self._load().make_context(info_name, args, parent, **extra)

    def _load(self) -> Any:
        entry_point, *others = self.claimed
        if others:
            origins = " and ".join(map(_origin, self.claimed))
            raise ConfigurationError(f"{origins} both provide a command {self.name!r}; uninstall one of them")
        try:
            function = entry_point.load()
        except (Exception, SystemExit) as error:  # an import may raise anything, and the message names the distribution
            raise ConfigurationError(
                f"command {self.name!r} of {_origin(entry_point)} cannot be loaded: {type(error).__name__}: {error}"
            ) from error
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        single.command(name=self.name)(function)
        return typer.main.get_command(single)


def _summary(claimed: tuple[metadata.EntryPoint, ...]) -> str:
    """What the sources say of a command, and who brings it."""
    module, _, attribute = claimed[0].value.partition(":")
    try:
        summary = SourceInspector().inspect(module, attribute).summary or "From"
    except StaticError as error:
        summary = f"BROKEN: {error}"
    return escape(f"{summary.removesuffix('.')} ({' and '.join(map(_origin, claimed))})")


def _origin(entry_point: metadata.EntryPoint) -> str:
    distribution = entry_point.dist
    return f"{distribution.metadata['Name']} {distribution.version}" if distribution else entry_point.value
