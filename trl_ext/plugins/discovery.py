"""Which plugins are installed, read from metadata alone; importing one is `load_plugin`'s business only.

An installed plugin is an entry point of the group `trl_ext`: its name is the plugin's name, its value a dataclass.
Installed is not active: nothing here runs a plugin.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name

from trl_ext.errors import ConfigurationError, did_you_mean
from trl_ext.hookspecs import API_VERSION
from trl_ext.plugins.places import load_place
from trl_ext.specs import is_name, is_place, own_name

ENTRY_POINT_GROUP = "trl_ext"


@dataclasses.dataclass(frozen=True)
class PluginInfo:
    """One plugin. `error` says why it cannot be used (BROKEN), or is None."""

    name: str
    distribution: str
    """The file or module, of a plugin that a config names by its place."""
    version: str
    value: str
    """Of the entry point: `trl_ext_objectives:Power`."""
    summary: str
    error: str | None = None

    def __str__(self) -> str:
        return f"{self.name!r} ({self.distribution} {self.version})"


def load_plugin(name: str) -> tuple[type, PluginInfo]:
    """Import one plugin's class.

    Args:
        name: As `parse_specs` gives it; naming a plugin by its place runs the code that is there.

    Raises:
        ConfigurationError: There is no such plugin, it does not fit what is installed, or its import fails (the
            original error is the cause).
    """
    plugin_class, info = _load_from_place(name) if is_place(name) else _load_installed(name)
    if not (isinstance(plugin_class, type) and dataclasses.is_dataclass(plugin_class)):
        raise ConfigurationError(
            f"plugin {info} is broken: {info.value!r} is not a dataclass, whose fields would be the options"
        )
    if problem := range_error(getattr(plugin_class, "requires_api", None), getattr(plugin_class, "requires_trl", None)):
        raise ConfigurationError(
            f"plugin {info} {problem}. Remove {name!r} from plugins, or install a version of it that fits"
        )
    return plugin_class, info


def _load_from_place(name: str) -> tuple[Any, PluginInfo]:
    found, version = load_place(name)
    return found, PluginInfo(own_name(name), name.rpartition(":")[0], version, name, "")


def _load_installed(name: str) -> tuple[Any, PluginInfo]:
    installed = Installation()
    entry_point = installed.find(name)
    info = installed.describe(entry_point)
    if problem := installed.problem(entry_point):
        raise ConfigurationError(f"plugin {info} is broken: {problem}. Remove {name!r} from plugins, or repair it")
    try:
        return entry_point.load(), info
    except (Exception, SystemExit) as error:  # a plugin's import may raise anything, and the message names the plugin
        raise ConfigurationError(
            f"plugin {info} is broken: importing {info.value!r} raised {type(error).__name__}: {error}. "
            f"{_hint_of_core(error)}Remove {name!r} from plugins, or repair it"
        ) from error


def _hint_of_core(error: BaseException) -> str:
    """What to do where an import fails for want of something in the core, so that no declared range could be read."""
    if not isinstance(error, ImportError) or (error.name or "").split(".")[0] != __name__.split(".")[0]:
        return ""
    return f"It was written for another trl-ext, and plugin API {API_VERSION} is installed: change either version. "


def find_distribution(plugin_class: type) -> PluginInfo | None:
    """The installed plugin whose entry point names this class or a module that exports it; None for a local class."""
    installed = Installation()
    for entry_point in installed.entry_points:
        module, _, attribute = entry_point.value.partition(":")
        # What exports the class is imported already, or else not where it came from.
        if attribute and getattr(sys.modules.get(module), attribute, None) is plugin_class:
            return installed.describe(entry_point)
    return None


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution; None where there is none."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def range_error(
    requires_api: Any,
    requires_trl: Any,
    version: Callable[[str], str | None] = installed_version,
) -> str | None:
    """Say how a plugin's declared ranges miss what is installed ("needs TRL >=2, but ..."); None where they fit."""
    for what, wanted, present in (("plugin API", requires_api, API_VERSION), ("TRL", requires_trl, version("trl"))):
        if wanted is None:
            continue
        if not isinstance(wanted, str):
            return f'declares the range {wanted!r} of {what}, which is not a text; write "{wanted}" in quotes'
        if re.fullmatch(r"\d+", wanted):
            wanted = f">={wanted},<{int(wanted) + 1}"
        try:
            fits = present is not None and SpecifierSet(wanted).contains(present, prereleases=True)
        except InvalidSpecifier:
            return f"declares the range {wanted!r} of {what}, which is not a version range"
        if not fits:
            return f"needs {what} {wanted}, but {present or 'none'} is installed"
    return None


class Installation:
    """A snapshot of what is installed. Listing has to answer at once, so each piece of metadata is parsed once."""

    def __init__(self) -> None:
        self._origins: dict[metadata.Distribution | None, tuple[str, str, str]] = {None: ("unknown", "unknown", "")}
        self._problems: dict[metadata.Distribution | None, str | None] = {}
        self._versions: dict[str, str | None] = {}
        found = metadata.entry_points(group=ENTRY_POINT_GROUP)
        self.entry_points = sorted(found, key=lambda entry_point: (entry_point.name, self._origin(entry_point.dist)))
        self._claims: defaultdict[str, list[metadata.EntryPoint]] = defaultdict(list)
        for entry_point in self.entry_points:
            self._claims[entry_point.name].append(entry_point)

    def find(self, name: str) -> metadata.EntryPoint:
        """The plugin that a config names, `power` or `distribution/power`.

        Raises:
            ConfigurationError: There is none, or several distributions have one and the name does not say which.
        """
        *distribution, own = name.split("/")
        wanted = {canonicalize_name(part) for part in distribution}
        claims = [c for c in self._claims[own] if not wanted or canonicalize_name(self._origin(c.dist)[0]) in wanted]
        if len(claims) == 1:
            return claims[0]
        if claims:
            origins = " and ".join(" ".join(self._origin(claim.dist)[:2]) for claim in claims)
            lines = " or ".join(f"plugins: [{self.reference(claim)}]" for claim in claims)
            raise ConfigurationError(f"{origins} both provide a plugin named {own!r}. Write {lines}")
        names = sorted({self.reference(entry_point) for entry_point in self.entry_points})
        raise ConfigurationError(
            f"plugins: [{name}]: no plugin of this name is installed. {did_you_mean(own, names)}"
            f"Installed: {', '.join(names) or 'none'}"
        )

    def reference(self, entry_point: metadata.EntryPoint) -> str:
        """What a config writes for a plugin: its name, with its distribution where another one has the same."""
        name = entry_point.name
        return name if len(self._claims[name]) == 1 else f"{self._origin(entry_point.dist)[0]}/{name}"

    def describe(self, entry_point: metadata.EntryPoint) -> PluginInfo:
        """What metadata says of a plugin."""
        distribution, version, summary = self._origin(entry_point.dist)
        return PluginInfo(entry_point.name, distribution, version, entry_point.value, summary)

    def problem(self, entry_point: metadata.EntryPoint) -> str | None:
        """Why the metadata alone rules a plugin out: its name, its value, an unmet requirement."""
        name, value = entry_point.name, entry_point.value
        if not is_name(name):
            return f"its name {name!r} cannot be written in a config (letters, digits, '_', '-', '.')"
        if not re.fullmatch(r"[\w.]+:\w+", value):
            return f"its entry point {value!r} is not of the form module:Class"
        if entry_point.dist not in self._problems:
            unmet = self.unmet_requirements(entry_point.dist) if entry_point.dist else ()
            self._problems[entry_point.dist] = next(iter(unmet), None)
        return self._problems[entry_point.dist]

    def _origin(self, distribution: metadata.Distribution | None) -> tuple[str, str, str]:
        """Name, version and summary of a distribution."""
        if distribution is not None and distribution not in self._origins:
            fields = distribution.metadata
            self._origins[distribution] = (fields["Name"], fields["Version"], fields["Summary"] or "")
        return self._origins[distribution]

    def version(self, distribution: str) -> str | None:
        """The version of an installed distribution; None where there is none."""
        if distribution not in self._versions:
            self._versions[distribution] = installed_version(distribution)
        return self._versions[distribution]

    def unmet_requirements(self, distribution: metadata.Distribution) -> Iterator[str]:
        """Where a distribution asks for what is not installed ("it requires pluggy>=99, but 1.6 is installed")."""
        environment: dict[str, Any] = {**default_environment(), "extra": ""}
        for text in distribution.requires or ():
            try:
                requirement = Requirement(text)
            except InvalidRequirement:
                yield f"its metadata holds an invalid requirement {text!r}"
                continue
            if requirement.marker and not requirement.marker.evaluate(environment):
                continue
            present = self.version(requirement.name)
            if present is None or not requirement.specifier.contains(present, prereleases=True):
                yield f"it requires {text}, but {present or 'none'} is installed"
