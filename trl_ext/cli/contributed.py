"""Commands that plugin distributions bring: listed from metadata, imported only when invoked."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from trl_ext.cli.sources import SourceInspector, StaticError
from trl_ext.errors import ConfigurationError, did_you_mean


class LightGroup(TyperGroup):
    """A command group that answers without pydantic, and names the nearest of its commands for a misspelt one."""

    def get_params(self, ctx: Any) -> Any:
        return _with_plain_flags(super().get_params(ctx))

    def get_command(self, ctx: Any, name: str) -> Any:
        command = super().get_command(ctx, name)
        if command is not None:
            _with_plain_flags(command.get_params(ctx))
        return command

    def get_short_help_str(self, limit: int = 45) -> str:
        return self.help or ""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            hint = did_you_mean(args[0], self.list_commands(ctx))
            ctx.fail(f"there is no command {args[0]!r}. {hint}".rstrip())
        return super().resolve_command(ctx, args)


def _with_plain_flags(options: Any) -> Any:
    """Let flags that are not given be False: typer loads pydantic to convert the None of `--help` and others."""
    for option in options:
        if getattr(option, "is_flag", False) and option.default is None:
            option.default = False
    return options


class LightCommand(TyperCommand):
    """A command whose listing shows the whole first line of its help."""

    def get_short_help_str(self, limit: int = 45) -> str:
        return (self.help or "").partition("\n")[0]


def contributed_group(entry_point_group: str) -> type[TyperGroup]:
    """A command group that adds, to its own commands, one for each entry point: a function with typer's annotations."""
    inspector = SourceInspector()  # one for all of them, since they share packages

    class ContributedGroup(LightGroup):
        def list_commands(self, ctx: Any) -> list[str]:
            return [*self.commands, *sorted(metadata.entry_points(group=entry_point_group).names - set(self.commands))]

        def get_command(self, ctx: Any, name: str) -> Any:
            if name in self.commands:
                return super().get_command(ctx, name)
            claimed = tuple(sorted(metadata.entry_points(group=entry_point_group, name=name), key=_origin))
            return _LazyCommand(name, claimed, inspector) if claimed else None

    return ContributedGroup


class _LazyCommand(TyperCommand):
    """Stands for a contributed command in listings, and becomes it when it is invoked."""

    def __init__(self, name: str, claimed: tuple[metadata.EntryPoint, ...], inspector: SourceInspector) -> None:
        super().__init__(name, callback=None)
        self.inspector = inspector
        self.claimed = claimed

    def get_short_help_str(self, limit: int = 45) -> str:
        return _summary(self.claimed, self.inspector)  # here, since only listings need the sources

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
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
        single.command(name=self.name, cls=LightCommand)(function)
        return typer.main.get_command(single)


def _summary(claimed: tuple[metadata.EntryPoint, ...], inspector: SourceInspector) -> str:
    """What the sources say of a command, and who brings it."""
    module, _, attribute = claimed[0].value.partition(":")
    try:
        summary = inspector.inspect(module, attribute).summary or "From"
    except StaticError as error:
        summary = f"BROKEN: {error}"
    return f"{summary.removesuffix('.')} ({' and '.join(map(_origin, claimed))})"


def _origin(entry_point: metadata.EntryPoint) -> str:
    distribution = entry_point.dist
    return f"{distribution.metadata['Name']} {distribution.version}" if distribution else entry_point.value
