"""From a plugin's options to what a config holds, and to what may be shown of them."""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl_ext.options import MASK, masked, option_fields
from trl_ext.specs import config_line


def resolved_options(plugin: object) -> dict[str, Any]:
    """The options of an instance as JSON values, secrets masked; {} for a plain class.

    A secret is declared as `field(repr=False)`, or looks like one.
    """
    written = written_options(plugin)
    fields = option_fields(type(plugin)) if written else {}
    return {name: masked(value, name) if fields[name].repr or not value else MASK for name, value in written.items()}


def written_options(plugin: object) -> dict[str, Any]:
    """The options of an instance as a config holds them, secrets and all; {} for a plain class."""
    if not dataclasses.is_dataclass(plugin):
        return {}
    return {name: as_written(getattr(plugin, name)) for name in option_fields(type(plugin))}


def as_written(value: Any) -> Any:
    """A value as a config holds it: a path as text, a member by its name; its `repr` where no config could."""

    def written(value: Any) -> str:
        return value.name if isinstance(value, enum.Enum) else str(value) if isinstance(value, Path) else repr(value)

    return written(value) if isinstance(value, enum.Enum) else json.loads(json.dumps(value, default=written))


def default_of(field: dataclasses.Field[Any], missing: Any) -> Any:
    """The default of an option as a config holds it; `missing` where there is none."""
    if field.default is not dataclasses.MISSING:
        return as_written(field.default)
    return missing if field.default_factory is dataclasses.MISSING else as_written(field.default_factory())


def line_of(plugin_class: type, spec: Mapping[str, Any], **changed: str) -> str:
    """`config_line` of a spec, in which what the plugin hides from `repr` is masked too."""
    hidden = {name for name, option in option_fields(plugin_class).items() if not option.repr}
    return config_line({key: MASK if key in hidden and value else value for key, value in spec.items()}, **changed)
