"""What a plugin declares about its options beside their types: bounds of numbers. The core refuses what is outside.

A choice is declared as `Literal["a", "b"]`, a bounded number as `Annotated[float, Range(gt=0, le=1)]`; both also
inside `X | None`, `list[X]`, `tuple[X, ...]`, `Sequence[X]`, `dict[str, X]` and `Mapping[str, X]`. What is declared
needs no check in `__post_init__` and is shown by `trl-ext plugins info`. Other values are refused with the plugin, the
option and the config line to change, whether they come from a config or with an instance that a script has made.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union

_MISSING = object()

MASK = "***"
"""Stands for a secret wherever a run shows or keeps its options."""
_SECRET_NAME = re.compile(r"(.*_)?(token|key|password|passphrase|secret|credentials?)", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\b(hf_|sk-|gh[a-z]_|github_pat_|glpat-|xox[a-z]-|AKIA)[\w-]{8,}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that an option may have: finite ones within the bounds that are given.

    Args:
        gt: Lower bound that is not itself allowed.
        ge: Lower bound that is.
        lt: Upper bound that is not itself allowed.
        le: Upper bound that is.

    Raises:
        ValueError: Two lower bounds, two upper bounds, or none at all.
    """

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None

    def __post_init__(self) -> None:
        if None not in (self.gt, self.ge) or None not in (self.lt, self.le):
            raise ValueError(f"{self!r} has two bounds on one side")
        if (self.gt, self.ge, self.lt, self.le) == (None,) * 4:
            raise ValueError("a Range needs at least one bound")

    def __contains__(self, value: float) -> bool:
        return (
            (isinstance(value, int) or math.isfinite(value))
            and (self.gt is None or value > self.gt)
            and (self.ge is None or value >= self.ge)
            and (self.lt is None or value < self.lt)
            and (self.le is None or value <= self.le)
        )

    def __str__(self) -> str:
        """The bounds as one writes them: `> 0`, `in [0, 1)`."""
        low, high = self.gt if self.ge is None else self.ge, self.lt if self.le is None else self.le
        if high is None:
            return f"{'>' if self.ge is None else '>='} {low:g}"
        if low is None:
            return f"{'<' if self.le is None else '<='} {high:g}"
        return f"in {'(' if self.ge is None else '['}{low:g}, {high:g}{')' if self.le is None else ']'}"


def option_fields(plugin_class: type) -> dict[str, dataclasses.Field[Any]]:
    """The options of a plugin class: the fields that its constructor takes."""
    return {field.name: field for field in dataclasses.fields(plugin_class) if field.init}


def masked(value: Any, name: str = "") -> Any:
    """A value as it may be shown: `***` for a text under a name such as `api_key`, and for what looks like a token.

    Args:
        value: the value of an option, as JSON.
        name: its option; the key, inside of a mapping.
    """
    if isinstance(value, Mapping):
        return {key: masked(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked(item, name) for item in value]
    if not isinstance(value, str) or not value:
        return value
    return MASK if _SECRET_NAME.fullmatch(name) else _SECRET_VALUE.sub(MASK, value)


def option_type(plugin_class: type, option: str) -> Any:
    """The annotation of one option, with its `Annotated` parts.

    Each is resolved on its own, since other fields may name types that only a type checker imports.
    """
    owner = next(base for base in plugin_class.__mro__ if option in inspect.get_annotations(base))
    annotation = inspect.get_annotations(owner)[option]
    alone = type("_", (), {"__annotations__": {option: annotation}, "__module__": owner.__module__})
    return typing.get_type_hints(alone, localns=dict(vars(owner)), include_extras=True)[option]


def check_options(plugin: Any) -> None:
    """Check the values of a plugin's options against what their annotations declare.

    The core calls this when it activates a plugin; a test of a plugin may call it too.

    Raises:
        ValueError: Names the option, its value, and what it may be.
    """
    if not dataclasses.is_dataclass(plugin):
        return
    for option in option_fields(type(plugin)):
        value = getattr(plugin, option, _MISSING)
        try:
            annotation = option_type(type(plugin), option)
        except NameError:  # a type that only a type checker imports; `plugins check` reports it
            continue
        if value is not _MISSING and (reason := violation(value, annotation)):
            raise ValueError(f"{option}={value!r} {reason}")


def violation(value: Any, annotation: Any) -> str | None:
    """Say how a value misses a declared choice or range ("is not > 0"); None where it fits, or nothing is declared."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        inner, *marks = arguments
        if reason := violation(value, inner):
            return reason
        ranges = [mark for mark in marks if isinstance(mark, Range)]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return next((f"is not {bounds}" for bounds in ranges if number and value not in bounds), None)
    if origin is Literal:
        return None if _is_chosen(value, arguments) else f"is not one of {', '.join(map(str, arguments))}"
    if origin in (Union, types.UnionType):
        reasons = [violation(value, member) for member in arguments if _may_be(value, member)]
        return None if not reasons or None in reasons else reasons[0]
    return next(filter(None, (violation(item, inner) for item, inner in _items(value, origin, arguments))), None)


def _is_chosen(value: Any, choices: tuple[Any, ...]) -> bool:
    """Whether a value is one of the choices; True is not the number 1."""
    return any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in choices)


def _may_be(value: Any, annotation: Any) -> bool:
    """Whether a value is of a member of a union, bounds and choices aside."""
    while typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return any(type(value) is type(choice) for choice in typing.get_args(annotation))
    kind = origin or annotation
    if kind is Any:
        return True
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is Sequence and isinstance(value, str):
        return False
    kinds = (int, float) if kind is float else kind
    return isinstance(kind, type) and isinstance(value, kinds)


def _items(value: Any, origin: Any, arguments: tuple[Any, ...]) -> Iterable[tuple[Any, Any]]:
    """The members of a container, each with its annotation."""
    if not arguments:
        return []
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return [(item, arguments[1]) for item in value.values()]
    if origin not in (list, tuple, Sequence) or not isinstance(value, list | tuple):
        return []
    if origin is not tuple or arguments[-1] is Ellipsis:
        return [(item, arguments[0]) for item in value]
    return list(zip(value, arguments, strict=False))
