"""The active plugins of a run, and the calls of their hooks in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pluggy

from trl_ext.errors import ConfigurationError
from trl_ext.hookspecs import HOOKS, PROJECT, HookSpecs
from trl_ext.plugins.declarations import Declarations
from trl_ext.plugins.implementations import implementations

HookCall = tuple[str, Callable[..., Any]]


@dataclass(frozen=True, eq=False)
class ActivePlugin:
    """One plugin of a run."""

    name: str
    """The label, or else the plugin's name; prefixes its metrics and names its state."""
    instance: Any
    distribution: str | None
    """None for an instance of a class that no distribution provides."""
    version: str | None
    options: dict[str, Any]
    """All options with their values, as JSON."""
    citation: str
    declared: Declarations
    line: str
    """The config line that activates it, for messages."""

    @property
    def origin(self) -> str:
        """Its distribution with the version, or else its class."""
        return f"{self.distribution} {self.version}" if self.distribution else class_of(self.instance)

    def __str__(self) -> str:
        return f"{self.name!r} ({self.origin})"


class _Registration:
    """What pluggy sees of a plugin: its hooks, with an identity of their own. Equal plugins do not collide then."""

    def __init__(self, hooks: dict[str, Callable[..., Any]]) -> None:
        vars(self).update(hooks)


class PluginSet:
    """The active plugins of one trainer, in the order of the config.

    Raises:
        ConfigurationError: A hook is misspelt, ill-formed, or claimed twice though exclusive.
    """

    def __init__(self, plugins: Sequence[ActivePlugin] = ()) -> None:
        self.plugins: tuple[ActivePlugin, ...] = tuple(plugins)
        self.manager = pluggy.PluginManager(PROJECT)
        self.manager.add_hookspecs(HookSpecs)
        for plugin in reversed(self.plugins):  # pluggy calls the last one registered first
            registration = _Registration(implementations(plugin.instance, str(plugin), plugin.line))
            self.manager.register(registration, plugin.name)
        # The training loop asks for these at every micro-step, so they are looked up once.
        self._calls: dict[str, list[HookCall]] = {hook: self._bind(hook) for hook in HOOKS}
        for hook, facts in HOOKS.items():
            if facts.kind == "exclusive":
                self._refuse_two_owners(hook)

    def __bool__(self) -> bool:
        return bool(self.plugins)

    def __len__(self) -> int:
        return len(self.plugins)

    def __iter__(self) -> Iterator[ActivePlugin]:
        return iter(self.plugins)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the plugins, in order."""
        return tuple(plugin.name for plugin in self.plugins)

    def implements(self, hook: str) -> bool:
        """Whether any plugin implements the hook."""
        return bool(self._calls[hook])

    def owner(self, hook: str) -> str | None:
        """Name of the plugin that owns an exclusive hook."""
        if HOOKS[hook].kind != "exclusive":
            raise KeyError(f"{hook!r} is not an exclusive hook")
        return next((name for name, _ in self._calls[hook]), None)

    def calls(self, hook: str) -> list[HookCall]:
        """Name and function of each implementation, in the order of the config.

        The function takes all arguments of the hook by keyword and passes on those that the implementation declares.
        """
        return self._calls[hook]

    def wrap(self, around: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> None:
        """Put something around every later call: `around` gets the hook's name and a call, and gives the new call."""
        for hook, calls in self._calls.items():
            self._calls[hook] = [(name, around(hook, call)) for name, call in calls]

    def _bind(self, hook: str) -> list[HookCall]:
        found = getattr(self.manager.hook, hook).get_hookimpls()[::-1]  # pluggy keeps them as registered
        return [(implementation.plugin_name, _by_keyword(implementation)) for implementation in found]

    def _refuse_two_owners(self, hook: str) -> None:
        names = [name for name, _ in self._calls[hook]]
        if len(names) > 1:
            owners = [plugin for plugin in self.plugins if plugin.name in names]
            raise ConfigurationError(
                f"hook {hook!r} can have one owner, and {' and '.join(map(str, owners))} claim it. "
                f"Keep one of {' or '.join(plugin.line for plugin in owners)}"
            )


def class_of(instance: Any) -> str:
    """The class of a plugin in words, for messages."""
    return f"class {type(instance).__qualname__} of {type(instance).__module__}"


def _by_keyword(implementation: pluggy.HookImpl) -> Callable[..., Any]:
    function, names = implementation.function, implementation.argnames

    def call(**arguments: Any) -> Any:
        return function(*[arguments[name] for name in names])

    return call
