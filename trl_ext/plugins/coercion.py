"""Options of a plugin: from config values to the types of its dataclass's annotations."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union

from trl_ext.errors import ConfigurationError
from trl_ext.options import Range, option_fields, option_type, violation
from trl_ext.specs import RESERVED, config_line, split_outside_brackets, unquote

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
    if origin in (Union, types.UnionType):
        return " | ".join(type_name(member) for member in arguments)
    if arguments:
        inner = ", ".join("..." if member is Ellipsis else type_name(member) for member in arguments)
        return f"{origin.__name__}[{inner}]"
    return getattr(annotation, "__name__", str(annotation))


def coerce(value: Any, annotation: Any) -> Any:
    """Turn a value from a config into one of the annotated type: text into numbers, truth values, lists and mappings.

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
    if origin in (list, tuple, dict):
        return _coerce_container(value, origin, arguments)
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
        ConfigurationError: An option is unknown, missing or of the wrong type.
    """
    fields = option_fields(plugin_class)
    given = {key: value for key, value in spec.items() if key not in RESERVED}
    for option in given:
        if option not in fields:
            near = difflib.get_close_matches(option, fields, n=3)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise ConfigurationError(
                f"plugin {origin} has no option {option!r}; {hint}Its options: {', '.join(fields) or 'none'}. "
                f"Change {config_line(spec)}"
            )
    for option, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and option not in given:
            kind = type_name(option_type(plugin_class, option))
            line = config_line(spec, **{option: f"<{kind}>"})
            raise ConfigurationError(f"plugin {origin} needs a value for option {option!r} ({kind}): {line}")
    values = {}
    for option, value in given.items():
        annotation = option_type(plugin_class, option)
        try:
            values[option] = coerce(value, annotation)
        except (TypeError, ValueError) as error:
            line = config_line(spec, **{option: f"<{type_name(annotation)}>"})
            raise ConfigurationError(f"plugin {origin}, option {option!r}: {error}. Change it to {line}") from error
        if reason := violation(values[option], annotation):
            line = config_line(spec, **{option: f"<{type_name(annotation)}>"})
            raise ConfigurationError(f"plugin {origin}: {option}={value!r} {reason}. Change it to {line}")
    return values


def resolved_options(plugin: object) -> dict[str, Any]:
    """The options of an instance as JSON values; what JSON cannot hold is given as its `repr`. {} for a plain class."""
    if not dataclasses.is_dataclass(plugin):
        return {}
    values = {name: getattr(plugin, name) for name in option_fields(type(plugin))}
    return json.loads(json.dumps(values, default=repr))


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


def _to_none(value: Any) -> None:
    if value is not None and not (isinstance(value, str) and value.strip().lower() in ("none", "null")):
        raise TypeError


_SCALARS: dict[Any, Any] = {
    bool: _to_bool,
    int: _to_number(int),
    float: _to_number(float),
    str: _to_str,
    type(None): _to_none,
}


def _choose(value: Any, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if (value == choice and type(value) is type(choice)) or (isinstance(value, str) and value == str(choice)):
            return choice
    raise _mismatch(value, Literal[choices])


def _bare(annotation: Any) -> Any:
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation


def _coerce_union(value: Any, members: tuple[Any, ...]) -> Any:
    # A text may be any member in disguise: `str` takes all of them, and `bool` the number 1, so these are asked last.
    for member in sorted(members, key=lambda member: {bool: 1, str: 2}.get(_bare(member), 0)):
        try:
            return coerce(value, member)
        except (TypeError, ValueError):
            continue
    raise _mismatch(value, Union[members])  # noqa: UP007  # of a tuple


def _coerce_container(value: Any, kind: type, arguments: tuple[Any, ...]) -> Any:
    if isinstance(value, str):
        value = _read_container(value, kind)
    annotation = kind[arguments] if arguments else kind  # type: ignore[index]
    if kind is dict:
        if not isinstance(value, Mapping):
            raise _mismatch(value, annotation)
        key_type, value_type = arguments or (Any, Any)
        return {coerce(key, key_type): coerce(item, value_type) for key, item in value.items()}
    if not isinstance(value, list | tuple):
        raise _mismatch(value, annotation)
    if kind is list or not arguments or arguments[-1] is Ellipsis:
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
