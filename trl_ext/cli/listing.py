"""The installed plugins for a person to read, from metadata and sources: none of them is imported."""

from __future__ import annotations

import dataclasses
from importlib import metadata

from trl_ext.cli.sources import Facts, SourceInspector, StaticError
from trl_ext.plugins.discovery import Installation, PluginInfo, range_error


def list_plugins() -> list[PluginInfo]:
    """All installed plugins, sorted by name."""
    installed, sources = Installation(), SourceInspector()
    return [_inspect(entry_point, installed, sources) for entry_point in installed.entry_points]


def _inspect(entry_point: metadata.EntryPoint, installed: Installation, sources: SourceInspector) -> PluginInfo:
    facts, error = Facts(), installed.problem(entry_point)
    if error is None:
        try:
            facts = sources.inspect(entry_point.module, entry_point.attr)
            error = range_error(facts.requires_api, facts.requires_trl, installed.version)
        except StaticError as found:
            error = str(found)
    info = installed.describe(entry_point)
    name = installed.reference(entry_point)
    return dataclasses.replace(info, name=name, summary=facts.summary or info.summary, error=error)
