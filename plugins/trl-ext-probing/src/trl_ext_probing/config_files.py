"""YAML files that say what a command does: `trl-ext compare` and `trl-ext probe excursions` read theirs alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from trl_ext.errors import ConfigurationError, did_you_mean
from trl_ext_probing.settings import OutputSettings

S = TypeVar("S", bound=OutputSettings)
OURS = ("model", "base", "output", "overwrite", "confidence")
"""Options of a probe that a file leaves to the command that reads it."""


def read_config(
    path: Path, kinds: Mapping[str, type | tuple[type, ...]], needed: set[str], setting: str
) -> dict[str, Any]:
    """The content of a file, with the keys that it may have; a key without a value counts as missing.

    Args:
        path: The file.
        kinds: Key to the type of its value.
        needed: Keys that have to be there.
        setting: What names the file, for the message.

    Raises:
        ConfigurationError: There is no such file, or it is not of this form.
    """
    if not path.is_file():
        near = did_you_mean(path.name, (other.name for other in path.parent.glob("*.y*ml")))
        raise ConfigurationError(f"{setting}: there is no file {str(path)!r}. {near}".rstrip())
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} has no keys; there are {', '.join(kinds)}")
    refuse_keys(str(path), content, kinds)
    content = {key: value for key, value in content.items() if value is not None}
    if missing := sorted(needed - content.keys()):
        raise ConfigurationError(f"{path} lacks {', '.join(missing)}")
    for key, value in content.items():
        if not isinstance(value, kinds[key]):
            kind = kinds[key]
            names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise ConfigurationError(f"{path}: {key} is a {type(value).__name__}, and should be a {names}")
    return content


def refuse_keys(where: str, content: Mapping[Any, Any], known: Mapping[str, Any] | tuple[str, ...]) -> None:
    """Refuse keys that are not known.

    Raises:
        ConfigurationError: With the nearest one that is.
    """
    if unknown := [str(key) for key in content if key not in known]:
        near = did_you_mean(unknown[0], known)
        raise ConfigurationError(f"{where}: unknown keys {', '.join(unknown)}. {near}There are {', '.join(known)}")


def probe_settings(where: str, kind: type[S], given: Mapping[str, Any], **own: Any) -> S:
    """Settings of a probe from a file, whose values are checked as those of the command are.

    Args:
        where: The file and the key, for messages.
        kind: The class of the settings.
        given: Options by the names that the settings have, but for `OURS`.
        **own: The options that the command that reads the file gives itself.

    Raises:
        ConfigurationError: An option is unknown or missing, or its value is refused.
    """
    options = {field.name: field for field in fields(kind) if field.name not in OURS}
    refuse_keys(where, given, options)
    needed = {name for name, f in options.items() if f.default is MISSING and f.default_factory is MISSING}
    if missing := sorted(needed - given.keys()):
        raise ConfigurationError(f"{where} lacks {', '.join(missing)}")
    try:
        return kind(**given, **own)
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: {error}") from None
    except TypeError as error:  # of a comparison: a text where a number is wanted
        raise ConfigurationError(f"{where}: a value is of another type than its option: {error}") from None
