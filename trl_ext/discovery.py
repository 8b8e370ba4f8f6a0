"""Which plugins are installed, read from metadata and sources alone; importing one is `load_plugin`'s business only.

A plugin is an entry point of the group `trl_ext`: its name is the plugin's name, its value a dataclass. Installed is
not active: nothing here runs a plugin.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from trl_ext.errors import ConfigurationError
from trl_ext.hookspecs import API_VERSION
from trl_ext.specs import NAME
from trl_ext.static_check import ClassFacts, SourceInspector, StaticError

ENTRY_POINT_GROUP = "trl_ext"


@dataclasses.dataclass(frozen=True)
class PluginInfo:
    """One installed plugin. `error` says why it cannot be used (BROKEN), or is None."""

    name: str
    distribution: str
    version: str
    value: str
    """Of the entry point: `trl_ext_objectives:Power`."""
    summary: str
    error: str | None = None

    def __str__(self) -> str:
        return f"{self.name!r} ({self.distribution} {self.version})"


def list_plugins() -> list[PluginInfo]:
    """All installed plugins, sorted by name, without importing any of them."""
    entry_points, inspector = _entry_points(), SourceInspector()
    return [_inspect(entry_point, entry_points, inspector) for entry_point in entry_points]


def load_plugin(name: str) -> tuple[type, PluginInfo]:
    """Import one plugin's class.

    Raises:
        ConfigurationError: There is no such plugin, it does not fit what is installed, or its import fails (the
            original error is the cause).
    """
    entry_points = _entry_points()
    claimed = [entry_point for entry_point in entry_points if entry_point.name == name]
    if not claimed:
        installed = sorted({entry_point.name for entry_point in entry_points})
        near = difflib.get_close_matches(name, installed, n=3)
        hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ConfigurationError(
            f"plugins: [{name}]: no plugin of this name is installed. {hint}Installed: {', '.join(installed) or 'none'}"
        )
    info = _describe(claimed[0])
    if problem := _conflict(claimed) or _ill_formed(claimed[0]) or _unmet_requirement(claimed[0]):
        raise ConfigurationError(f"plugin {info} is broken: {problem}. Remove {name!r} from plugins, or repair it")
    try:
        plugin_class = claimed[0].load()
    except (Exception, SystemExit) as error:  # a plugin's import may raise anything, and the message names the plugin
        raise ConfigurationError(
            f"plugin {info} is broken: importing {info.value!r} raised {type(error).__name__}: {error}. "
            f"Remove {name!r} from plugins, or repair it"
        ) from error
    if not (isinstance(plugin_class, type) and dataclasses.is_dataclass(plugin_class)):
        raise ConfigurationError(
            f"plugin {info} is broken: {info.value!r} is not a dataclass, whose fields would be the options"
        )
    if problem := range_error(getattr(plugin_class, "requires_api", None), getattr(plugin_class, "requires_trl", None)):
        raise ConfigurationError(
            f"plugin {info} {problem}. Remove {name!r} from plugins, or install a version of it that fits"
        )
    return plugin_class, info


def find_distribution(plugin_class: type) -> PluginInfo | None:
    """The installed plugin whose entry point names this class or a module that exports it; None for a local class."""
    for entry_point in _entry_points():
        module, _, attribute = entry_point.value.partition(":")
        # What exports the class is imported already, or else not where it came from.
        if attribute and getattr(sys.modules.get(module), attribute, None) is plugin_class:
            return _describe(entry_point)
    return None


def range_error(requires_api: str | None, requires_trl: str | None) -> str | None:
    """Say how a plugin's declared ranges miss what is installed ("needs TRL >=2, but ..."); None where they fit."""
    for what, wanted, present in (
        ("plugin API", _api_range(requires_api), API_VERSION),
        ("TRL", requires_trl, _version("trl")),
    ):
        if wanted is None:
            continue
        try:
            fits = present is not None and SpecifierSet(wanted).contains(present, prereleases=True)
        except InvalidSpecifier:
            return f"declares the range {wanted!r} of {what}, which is not a version range"
        if not fits:
            return f"needs {what} {wanted}, but {present or 'none'} is installed"
    return None


def _entry_points() -> list[metadata.EntryPoint]:
    return sorted(metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda e: (e.name, _describe(e).distribution))


def _describe(entry_point: metadata.EntryPoint) -> PluginInfo:
    distribution = entry_point.dist
    name, version, summary = ("unknown", "unknown", "")
    if distribution is not None:
        name, version = distribution.metadata["Name"], distribution.version
        summary = distribution.metadata.get("Summary", "")  # type: ignore[attr-defined]
    return PluginInfo(entry_point.name, name, version, entry_point.value, summary)


def _inspect(
    entry_point: metadata.EntryPoint, entry_points: list[metadata.EntryPoint], inspector: SourceInspector
) -> PluginInfo:
    info, facts = _describe(entry_point), ClassFacts()
    error = _conflict([other for other in entry_points if other.name == entry_point.name])
    error = error or _ill_formed(entry_point) or _unmet_requirement(entry_point)
    if error is None:
        try:
            facts = inspector.inspect(entry_point.module, entry_point.attr)
            error = range_error(facts.requires_api, facts.requires_trl)
        except StaticError as found:
            error = str(found)
    return dataclasses.replace(info, summary=facts.summary or info.summary, error=error)


def _ill_formed(entry_point: metadata.EntryPoint) -> str | None:
    if not NAME.fullmatch(entry_point.name):
        return f"its name {entry_point.name!r} cannot be written in a config (letters, digits, '_', '-', '.')"
    if not re.fullmatch(r"[\w.]+:\w+", entry_point.value):
        return f"its entry point {entry_point.value!r} is not of the form module:Class"
    return None


def _conflict(claimed: list[metadata.EntryPoint]) -> str | None:
    if len(claimed) < 2:
        return None
    claimants = " and ".join(f"{info.distribution} {info.version}" for info in map(_describe, claimed))
    return f"{claimants} both provide a plugin named {claimed[0].name!r}; uninstall one of them"


def _unmet_requirement(entry_point: metadata.EntryPoint) -> str | None:
    return next(_unmet_requirements(entry_point), None)


def _unmet_requirements(entry_point: metadata.EntryPoint) -> Iterator[str]:
    environment: dict[str, Any] = {**default_environment(), "extra": ""}
    for text in (entry_point.dist.requires if entry_point.dist else None) or ():
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            yield f"its metadata holds an invalid requirement {text!r}"
            continue
        if requirement.marker and not requirement.marker.evaluate(environment):
            continue
        present = _version(requirement.name)
        if present is None or not requirement.specifier.contains(present, prereleases=True):
            yield f"it requires {text}, but {present or 'none'} is installed"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _api_range(requires_api: str | None) -> str | None:
    """ "1" means any version 1.x; anything else is a range as packaging knows them."""
    if requires_api and re.fullmatch(r"\d+", requires_api):
        return f">={requires_api},<{int(requires_api) + 1}"
    return requires_api
