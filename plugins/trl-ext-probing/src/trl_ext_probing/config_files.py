"""YAML files that say what a command does: `trl-ext compare` and `trl-ext probe excursions` read theirs alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from trl_ext.cli import read_yaml
from trl_ext.errors import ConfigurationError, did_you_mean
from trl_ext_probing.settings import OutputSettings, takes

S = TypeVar("S", bound=OutputSettings)
Kinds = Mapping[str, type | tuple[type, ...]]
OURS = ("model", "base", "output", "overwrite", "confidence")
"""Options of a probe that a file leaves to the command that reads it."""


def read_config(path: Path, kinds: Kinds, needed: set[str], setting: str) -> dict[str, Any]:
    """The content of a file, with the keys that it may have; a key without a value counts as missing.

    Args:
        path: The file.
        kinds: Key to the type of its value.
        needed: Keys that have to be there.
        setting: What names the file, for the message.

    Raises:
        ConfigurationError: There is no such file, or it is not of this form.
    """
    return checked(str(path), read_yaml(path, setting), kinds, needed)


def checked(where: str, content: Mapping[Any, Any], kinds: Kinds, needed: set[str]) -> dict[str, Any]:
    """A mapping with the keys that it may have, of values of their kinds; one without a value counts as missing.

    Raises:
        ConfigurationError: It is not of this form.
    """
    refuse_keys(where, content, kinds)
    content = {key: value for key, value in content.items() if value is not None}
    if missing := sorted(needed - content.keys()):
        raise ConfigurationError(f"{where} lacks {', '.join(missing)}")
    for key, value in content.items():
        wanted = kinds[key]
        every = wanted if isinstance(wanted, tuple) else (wanted,)
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in every):
            names = " or ".join(kind.__name__ for kind in every)
            raise ConfigurationError(f"{where}: {key} is a {type(value).__name__}, and should be a {names}")
    return content


def refuse_names(where: str, content: Mapping[Any, Any]) -> None:
    """Refuse names that YAML has read as something else than text: 1, no, on.

    Raises:
        ConfigurationError: With the first of them.
    """
    if wrong := [name for name in content if not isinstance(name, str)]:
        raise ConfigurationError(
            f"{where}: YAML reads a name as {wrong[0]!r}, a {type(wrong[0]).__name__}; write it in quotes"
        )


def refuse_keys(where: str, content: Mapping[Any, Any], known: Mapping[str, Any] | tuple[str, ...]) -> None:
    """Refuse keys that are not known.

    Raises:
        ConfigurationError: With the nearest one that is.
    """
    if unknown := [str(key) for key in content if key not in known]:
        near = did_you_mean(unknown[0], known)
        raise ConfigurationError(f"{where}: unknown keys {', '.join(unknown)}. {near}There are {', '.join(known)}")


def probe_settings(where: str, kind: type[S], given: Mapping[str, Any], **own: Any) -> S:
    """Settings of a probe from a file, whose values are checked as those of the command are; a number may be a text.

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
    hints = get_type_hints(kind)
    given = {name: _of_type(f"{where}: {name}", hints[name], value) for name, value in given.items()}
    try:
        return kind(**given, **own)
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: {error}") from None


def _of_type(where: str, hint: Any, value: Any) -> Any:
    """A value of a file as its option takes it: `k: 1` is the text "1" of the command line."""
    wanted = [kind for kind in (bool, int, float, str, list, type(None)) if takes(hint, kind)]
    if not wanted or type(value) in wanted or (type(value) is int and float in wanted):
        return value
    if str in wanted and type(value) in (int, float):
        return str(value)
    names = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in wanted)
    raise ConfigurationError(f"{where}: {value!r} is a {type(value).__name__}, and should be a {names}")
