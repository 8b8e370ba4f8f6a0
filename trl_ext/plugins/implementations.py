"""Which hooks a plugin implements, and the mistakes in writing them that pluggy would let pass."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from trl_ext.errors import ConfigurationError
from trl_ext.hookspecs import HOOKS, PROJECT
from trl_ext.records import TRAINERS

_MARK = f"{PROJECT}_impl"


def implementations(plugin: Any, origin: str, line: str) -> dict[str, Callable[..., Any]]:
    """The hooks of a plugin, as bound methods.

    Args:
        origin: The plugin in words, for messages.
        line: The config line to change.

    Raises:
        ConfigurationError: A marked method is no hook, carries call-order options or defaults, or something named like
            a hook is not marked.
    """
    found = {}
    for name in dir(plugin):
        static = inspect.getattr_static(plugin, name, None)
        marks = _marks(static)
        if marks is None:
            if name in HOOKS:
                raise ConfigurationError(
                    f"plugin {origin}: {name!r} is the name of a hook, but it is not a method marked @hookimpl. "
                    f"Mark or rename it, or take it out of {line}"
                )
            continue
        if name not in HOOKS:
            near = difflib.get_close_matches(name, HOOKS, n=3)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise ConfigurationError(
                f"plugin {origin}: there is no hook {name!r}; {hint}Hooks: {', '.join(HOOKS)}. "
                f"Rename it, or take it out of {line}"
            )
        if given := sorted(option for option, value in marks.items() if value):
            raise ConfigurationError(
                f"plugin {origin}, hook {name!r}: @hookimpl({given[0]}=...) is not supported; plugins run in the order "
                f"of the config. Mark it with a plain @hookimpl, or take it out of {line}"
            )
        method = getattr(plugin, name)
        for parameter in inspect.signature(method).parameters.values():
            if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD or parameter.default is not parameter.empty:
                raise ConfigurationError(
                    f"plugin {origin}, hook {name!r}: argument '{parameter}' would never be passed; name it plainly, "
                    f"without default or star, or take it out of {line}"
                )
        found[name] = method
    if not found:
        raise ConfigurationError(
            f"plugin {origin} implements no hook; mark its methods with @hookimpl, or remove {line}"
        )
    return found


def marked_hooks(plugin: Any) -> tuple[str, ...]:
    """Names of the hooks that a plugin or plugin class marks, in the order of the contract."""
    return tuple(name for name in HOOKS if _marks(inspect.getattr_static(plugin, name, None)) is not None)


def supported_trainers(plugin: Any) -> tuple[str, ...]:
    """The trainers that a plugin or plugin class is for: all of them, unless it says otherwise."""
    trainers = getattr(plugin, "trainers", TRAINERS)
    return (trainers,) if isinstance(trainers, str) else tuple(trainers)


def refuse_other_trainer(plugin: Any, trainer: str, origin: str, line: str) -> None:
    """Refuse a plugin that declares itself, or shows by its hooks, to be for another trainer.

    Raises:
        ConfigurationError: The plugin would do nothing, or harm.
    """
    supported = supported_trainers(plugin)
    if trainer not in supported:
        raise ConfigurationError(
            f"plugin {origin} is for the trainers {', '.join(supported)}, and this is {trainer}. Remove {line}"
        )
    acting = [name for name in marked_hooks(plugin) if not HOOKS[name].bystander]
    if acting and not any(trainer in HOOKS[name].trainers for name in acting):
        raise ConfigurationError(
            f"plugin {origin} acts only through {', '.join(acting)}, which {trainer} never calls. Remove {line}"
        )


def _marks(attribute: Any) -> dict[str, Any] | None:
    """The options of an attribute's @hookimpl; None where it is not marked."""
    function = getattr(attribute, "__func__", attribute)
    marks = getattr(function, _MARK, None)
    return marks if isinstance(marks, dict) else None
