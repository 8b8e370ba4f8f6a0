"""Which hooks a plugin implements, and the mistakes in writing them that pluggy would let pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from trl_ext.errors import ConfigurationError, did_you_mean
from trl_ext.hookspecs import HOOKS, PROJECT, HookSpecs

_MARK = f"{PROJECT}_impl"


def implementations(plugin: Any, origin: str, line: str) -> dict[str, Callable[..., Any]]:
    """The hooks of a plugin, as bound methods.

    Args:
        origin: The plugin in words, for messages.
        line: The config line to change.

    Raises:
        ConfigurationError: A marked method is no hook, carries call-order options, has arguments that the hook does not
            pass, or would not run when called; or something named like a hook is not marked.
    """
    found = {}
    for name in dir(plugin):
        marks = _marks(inspect.getattr_static(plugin, name, None))
        if marks is None and name not in HOOKS:
            continue
        if fault := _fault_of_mark(name, marks) or _fault_of_method(name, getattr(plugin, name)):
            raise ConfigurationError(f"plugin {origin}{fault}, or take it out of {line}")
        found[name] = getattr(plugin, name)
    if not found:
        raise ConfigurationError(
            f"plugin {origin} implements no hook; mark its methods with @hookimpl, or remove {line}"
        )
    return found


def marked_hooks(plugin: Any) -> tuple[str, ...]:
    """Names of the hooks that a plugin or plugin class marks, in the order of the contract."""
    return tuple(name for name in HOOKS if _marks(inspect.getattr_static(plugin, name, None)) is not None)


def _marks(attribute: Any) -> dict[str, Any] | None:
    """The options of an attribute's @hookimpl; None where it is not marked."""
    function = getattr(attribute, "__func__", attribute)
    marks = getattr(function, _MARK, None)
    return marks if isinstance(marks, dict) else None


def _fault_of_mark(name: str, marks: dict[str, Any] | None) -> str | None:
    if marks is None:
        return f": {name!r} is the name of a hook, but it is not a method marked @hookimpl. Mark or rename it"
    if name not in HOOKS:
        return f": there is no hook {name!r}. {did_you_mean(name, HOOKS)}Hooks: {', '.join(HOOKS)}. Rename it"
    if given := sorted(option for option, value in marks.items() if value):
        return (
            f", hook {name!r}: @hookimpl({given[0]}=...) is not supported; plugins run in the order of the config. "
            "Mark it with a plain @hookimpl"
        )
    return None


def _fault_of_method(name: str, method: Callable[..., Any]) -> str | None:
    known = list(inspect.signature(getattr(HookSpecs, name)).parameters)[1:]
    for parameter in inspect.signature(method).parameters.values():
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD or parameter.default is not parameter.empty:
            return (
                f", hook {name!r}: argument '{parameter}' would never be passed; name it plainly, without default or "
                "star"
            )
        if parameter.name not in known:
            return (
                f", hook {name!r}: it has no argument {parameter.name!r}. {did_you_mean(parameter.name, known)}"
                f"Its arguments: {', '.join(known) or 'none'}. Rename it"
            )
    if inspect.isgeneratorfunction(method) or inspect.iscoroutinefunction(method):
        kind = "async" if inspect.iscoroutinefunction(method) else "a generator"
        return (
            f", hook {name!r}: it is {kind}, so that calling it would run nothing of it; write @contextmanager between "
            f"@hookimpl and `def {name}` where the hook gives a context, and return the result elsewhere"
        )
    return None
