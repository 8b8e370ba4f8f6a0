"""Options of a plugin: from config values to the types of its dataclass's annotations."""

from __future__ import annotations

import dataclasses
import enum
import json
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from trl_ext.errors import ConfigurationError, did_you_mean
from trl_ext.options import Range, option_fields, option_type, violation
from trl_ext.plugins.written_options import line_of
from trl_ext.specs import RESERVED, split_outside_brackets, unquote

_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def type_name(annotation: Any) -> str:
    """An annotation as its author wrote it: `float`, `int | None`, `float in [0, 1]`, `one of 'a', 'b'`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "None"
    if origin is Annotated:
        inner, *marks = arguments
        return " ".join([type_name(inner), *(str(mark) for mark in marks if isinstance(mark, Range))])
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in arguments)
    if _is_enum(annotation):
        return "one of " + ", ".join(annotation.__members__)
    if origin in (Union, types.UnionType):
        return " | ".join(type_name(member) for member in arguments)
    if arguments:
        inner = ", ".join("..." if member is Ellipsis else type_name(member) for member in arguments)
        return f"{origin.__name__}[{inner}]"
    return getattr(annotation, "__name__", str(annotation))


def coerce(value: Any, annotation: Any) -> Any:
    """Turn a value from a config into one of the annotated type: text into numbers, truth values, paths and containers.

    A member of an `Enum` is written as its name; a `Sequence` becomes a tuple, and a `Mapping` a dict.

    Raises:
        ValueError: The value is not of the type; the message says what was expected.
        TypeError: The type cannot come from a config.
    """
    origin, arguments = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if origin is Any:
        return value
    if origin is Annotated:
        return coerce(value, arguments[0])
    if origin is Literal:
        return _choose(value, arguments)
    if origin in (Union, types.UnionType):
        return _coerce_union(value, arguments)
    if origin in _CONTAINERS:
        return _coerce_container(value, annotation)
    if _is_enum(origin):
        return _member(value, origin)
    if origin not in _SCALARS:
        raise TypeError(f"type {type_name(annotation)} cannot be written in a config")
    try:
        return _SCALARS[origin](value)
    except (KeyError, TypeError, ValueError):
        raise _mismatch(value, annotation) from None


def build_options(plugin_class: type, spec: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Check a spec's options against the plugin's dataclass, and give the constructor's arguments.

    Args:
        origin: The plugin in words, for messages: `'power' (trl-ext-objectives 0.1.0)`.

    Raises:
        ConfigurationError: An option is unknown, missing, of the wrong type or outside of what it may be.
    """
    _refuse_reserved_options(plugin_class, origin)
    fields = option_fields(plugin_class)
    given = {key: value for key, value in spec.items() if key not in RESERVED}
    for option in given:
        if option not in fields:
            hint = did_you_mean(option, fields)
            if isinstance(getattr(plugin_class, option, None), bool | int | float | str | list | tuple | dict):
                hint = f"Its class sets one without an annotation: write `{option}: <type> = ...` there. "
            raise ConfigurationError(
                f"plugin {origin} has no option {option!r}. {hint}Its options: {', '.join(fields) or 'none'}. "
                f"Change {line_of(plugin_class, spec)}"
            )
    for option, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and option not in given:
            kind = type_name(option_type(plugin_class, option))
            line = line_of(plugin_class, spec, **{option: f"<{kind}>"})
            raise ConfigurationError(f"plugin {origin} needs a value for option {option!r} ({kind}): {line}")
    values = {}
    for option, value in given.items():
        annotation = option_type(plugin_class, option)
        try:
            values[option] = coerce(value, annotation)
        except (TypeError, ValueError) as error:
            line = line_of(plugin_class, spec, **{option: f"<{type_name(annotation)}>"})
            raise ConfigurationError(f"plugin {origin}, option {option!r}: {error}. Change it to {line}") from error
        if reason := violation(values[option], annotation):
            line = line_of(plugin_class, spec, **{option: f"<{type_name(annotation)}>"})
            raise ConfigurationError(f"plugin {origin}: {option}={values[option]!r} {reason}. Change it to {line}")
    return values


def check_option_types(plugin_class: type, origin: str) -> None:
    """Check that every option of a plugin can be written in a config, and that its default is one it accepts.

    Raises:
        ConfigurationError: Naming the option.
    """
    _refuse_reserved_options(plugin_class, origin)
    for option, field in option_fields(plugin_class).items():
        try:
            annotation = option_type(plugin_class, option)
        except NameError as error:
            raise ConfigurationError(
                f"plugin {origin}: the type of option {option!r} is not imported: {error}"
            ) from error
        if part := _unwritable(annotation):
            raise ConfigurationError(
                f"plugin {origin}: option {option!r} has the type {part}, which cannot be written in a config; use "
                "numbers, texts, truth values, Path, Enum, Literal, and lists, tuples or mappings of them"
            )
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if default is not dataclasses.MISSING and (reason := violation(default, annotation)):
            raise ConfigurationError(
                f"plugin {origin}: the default {option}={default!r} {reason}, as its own annotation asks; change one"
            )


def _refuse_reserved_options(plugin_class: type, origin: str) -> None:
    for option in RESERVED:
        if option in option_fields(plugin_class):
            raise ConfigurationError(
                f"plugin {origin} has an option {option!r}, a name that configs reserve; rename it"
            )


def _to_bool(value: Any) -> bool:
    return value if isinstance(value, bool) else _TRUTH[_to_str(value).strip().lower()]


def _to_number(kind: type[int] | type[float]) -> Any:
    accepted = (int, str) if kind is int else (int, float, str)

    def convert(value: Any) -> int | float:
        if isinstance(value, bool) or not isinstance(value, accepted):
            raise TypeError
        return kind(value)

    return convert


def _to_str(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _to_path(value: Any) -> Path:
    return Path(_to_str(value))


def _to_none(value: Any) -> None:
    if value is not None and not (isinstance(value, str) and value.strip().lower() in ("none", "null")):
        raise TypeError


_SCALARS: dict[Any, Any] = {
    bool: _to_bool,
    int: _to_number(int),
    float: _to_number(float),
    str: _to_str,
    Path: _to_path,
    type(None): _to_none,
}
_CONTAINERS: dict[Any, type] = {list: list, tuple: tuple, Sequence: tuple, dict: dict, Mapping: dict}
"""What each kind of annotation gives."""


def _unwritable(annotation: Any) -> str | None:
    """The part of an annotation that no config can hold; None where all of it can be written."""
    origin, arguments = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if origin is Annotated:
        return _unwritable(arguments[0])
    if origin in (Union, types.UnionType):
        parts = [_unwritable(member) for member in arguments if member is not type(None)]
        return None if None in parts else parts[0]
    if origin in _CONTAINERS:
        return next(filter(None, (_unwritable(member) for member in arguments if member is not Ellipsis)), None)
    writable = origin in (Any, Literal) or origin in _SCALARS or _is_enum(origin)
    return None if writable else type_name(annotation)


def _is_enum(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, enum.Enum)


def _member(value: Any, kind: type[enum.Enum]) -> enum.Enum:
    try:
        return kind[value]
    except KeyError:
        raise _mismatch(value, kind) from None


def _choose(value: Any, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if (value == choice and type(value) is type(choice)) or (isinstance(value, str) and value == str(choice)):
            return choice
    raise _mismatch(value, Literal[choices])


def _bare(annotation: Any) -> Any:
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation


def _coerce_union(value: Any, members: tuple[Any, ...]) -> Any:
    # A text may be any member in disguise: `str` and `Path` take all of them, and `bool` the number 1; they come last.
    for member in sorted(members, key=lambda member: {bool: 1, str: 2, Path: 2}.get(_bare(member), 0)):
        try:
            return coerce(value, member)
        except (TypeError, ValueError):
            continue
    raise _mismatch(value, Union[members])  # noqa: UP007  # of a tuple


def _coerce_container(value: Any, annotation: Any) -> Any:
    origin, arguments = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    kind = _CONTAINERS[origin]
    if isinstance(value, str):
        value = _read_container(value, kind)
    if kind is dict:
        if not isinstance(value, Mapping):
            raise _mismatch(value, annotation)
        key_type, value_type = arguments or (Any, Any)
        return {coerce(key, key_type): coerce(item, value_type) for key, item in value.items()}
    if not isinstance(value, list | tuple):
        raise _mismatch(value, annotation)
    if origin is not tuple or not arguments or arguments[-1] is Ellipsis:
        return kind(coerce(item, arguments[0] if arguments else Any) for item in value)
    if len(value) != len(arguments):
        raise ValueError(f"expected {type_name(annotation)}, got {len(value)} values: {value!r}")
    return tuple(coerce(item, member) for item, member in zip(value, arguments, strict=True))


def _read_container(text: str, kind: type) -> Any:
    """Read JSON, or a list without quotes around its texts: `[q_proj,v_proj]`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        inner = text.strip()
        if kind is dict or not inner or (inner[0], inner[-1]) not in (("[", "]"), ("(", ")")):
            return text
        return [unquote(part) for part in split_outside_brackets(inner[1:-1]) if part.strip()]


def _mismatch(value: Any, annotation: Any) -> ValueError:
    return ValueError(f"expected {type_name(annotation)}, got {value!r} ({type(value).__name__})")
