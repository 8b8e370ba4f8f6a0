"""Errors that name the plugin, its distribution, the hook, the step and the line to change."""

from __future__ import annotations

from collections.abc import Iterable


class TrlExtError(Exception):
    """Base of all errors that trl_ext raises on purpose."""


class ConfigurationError(TrlExtError, ValueError):
    """The run as asked for cannot work; raised before the model loads wherever that can be known."""


class PluginError(TrlExtError, RuntimeError):
    """A plugin's hook failed; on several ranks, every rank raises it at the same step."""


class OnAllRanksError(TrlExtError, RuntimeError):
    """For hooks that have told all ranks of a failure on one: raised on every rank alike, it stops them at once.

    A hook that communicates by itself raises it after the exchange, with one message on all ranks.
    """


class NonFiniteError(TrlExtError, ArithmeticError):
    """A gradient or loss was NaN or infinite before the optimiser's step."""


class StreamExhaustedError(TrlExtError, RuntimeError):
    """An auxiliary data set that may not end has no full batch left; raised on every rank alike."""


class CheckpointError(TrlExtError, RuntimeError):
    """A checkpoint is incomplete, corrupt, or belongs to other plugins."""


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """A hint for a word that is none of those that are known: "Did you mean 'power'? ", or "" where none is near."""
    import difflib

    near = difflib.get_close_matches(word, list(words), n=3)
    return f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
