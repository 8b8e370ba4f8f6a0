"""Which plugins may run together, and in which order: what each declares of the others, by the words they provide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trl_ext.errors import ConfigurationError
from trl_ext.plugins.plugin_set import ActivePlugin


def refuse_relations(plugins: Sequence[ActivePlugin]) -> None:
    """Hold the active plugins to what they declare under `conflicts` and `after`.

    Raises:
        ConfigurationError: Naming both plugins, the reason that one of them gives, and the lines to change.
    """
    for place, plugin in enumerate(plugins):
        for word, reason in plugin.declared.conflicts.items():
            for other in _providing(word, [*plugins[:place], *plugins[place + 1 :]]):
                raise ConfigurationError(
                    f"plugin {plugin} does not run beside {other}: {_sentence(reason)} "
                    f"Keep one of {plugin.line} or {other.line}"
                )
        for word, reason in plugin.declared.after.items():
            for other in _providing(word, plugins[place + 1 :]):
                raise ConfigurationError(
                    f"plugin {plugin} has to be named after {other}: {_sentence(reason)} "
                    f"Put {other.line} before {plugin.line}"
                )


def _providing(word: str, plugins: Sequence[ActivePlugin]) -> Iterator[ActivePlugin]:
    return (plugin for plugin in plugins if word in plugin.declared.provides)


def _sentence(reason: str) -> str:
    return reason if reason.endswith((".", "!", "?")) else f"{reason}."
