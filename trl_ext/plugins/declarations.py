"""What a plugin's class declares beside its options and hooks, and the slips in it that Python would let pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trl_ext.errors import ConfigurationError
from trl_ext.records import TRAINERS, Column


@dataclass(frozen=True)
class Declarations:
    """The class attributes by which a plugin says what it is for and what it goes with; docs/hooks.md explains each."""

    trainers: tuple[str, ...] = TRAINERS
    """The trainers that it is for; all of them, unless it says otherwise."""
    fused_outputs: tuple[str, ...] = ()
    """Outputs of TRL's fused head that it wants beside the log-probabilities and the entropy."""
    rollout_outputs: tuple[str, ...] = ()
    """Fields of `Rollouts` that are computed where a plugin wants them."""
    columns: tuple[Column, ...] = ()
    """Columns of the data that it reads."""
    provides: tuple[str, ...] = ()
    """The words that the relations of other plugins may name; its own name comes first."""
    conflicts: Mapping[str, str] = field(default_factory=dict)
    """Word to reason: it does not run beside a plugin that provides the word."""
    after: Mapping[str, str] = field(default_factory=dict)
    """Word to reason: it is named after every plugin that provides the word."""
    unsupported: Mapping[str, str] = field(default_factory=dict)
    """Name of a setting, or of another case of the conformance kit, to the reason why it does not go with it."""


def read_declarations(plugin: Any, name: str, origin: str, line: str) -> Declarations:
    """Read the declarations of a plugin or plugin class.

    Args:
        plugin: The instance, or its class.
        name: The plugin's own name, whatever label a config gives it.
        origin: The plugin in words, for messages.
        line: The config line to change.

    Raises:
        ConfigurationError: A declaration is not of the documented form.
    """
    try:
        declared = Declarations(
            trainers=_words(plugin, "trainers", TRAINERS),
            fused_outputs=_words(plugin, "fused_outputs"),
            rollout_outputs=_words(plugin, "rollout_outputs"),
            columns=_columns(plugin),
            provides=(name, *_words(plugin, "provides")),
            conflicts=_reasons(plugin, "conflicts"),
            after=_reasons(plugin, "after"),
            unsupported=_reasons(plugin, "unsupported"),
        )
        _refuse_unknown_trainers(declared.trainers)
        _refuse_unknown_rollout_outputs(declared.rollout_outputs)
        _refuse_itself_before_itself(declared)
        _refuse_half_a_state(plugin)
    except ValueError as error:
        raise ConfigurationError(f"plugin {origin} {error}, or remove {line}") from None
    return declared


def _words(plugin: Any, attribute: str, default: tuple[str, ...] = ()) -> tuple[str, ...]:
    value = getattr(plugin, attribute, default)
    if isinstance(value, str):
        raise ValueError(f"declares {attribute} = {value!r}, a bare text; write {attribute} = ({value!r},)")
    if not isinstance(value, tuple | list) or not all(isinstance(word, str) for word in value):
        raise ValueError(f"declares {attribute} = {value!r}, which is not a tuple of texts; make it one")
    return tuple(value)


def _columns(plugin: Any) -> tuple[Column, ...]:
    value = getattr(plugin, "columns", ())
    if isinstance(value, property):  # of a class, whose instances know their options
        return ()
    if not isinstance(value, tuple | list) or not all(isinstance(column, Column) for column in value):
        raise ValueError(
            f"declares columns = {value!r}, which is not a tuple of Column; write columns = (Column(...),)"
        )
    return tuple(value)


def _reasons(plugin: Any, attribute: str) -> dict[str, str]:
    value = getattr(plugin, attribute, {})
    if not isinstance(value, Mapping) or not all(
        isinstance(text, str) and text for item in value.items() for text in item
    ):
        raise ValueError(
            f"declares {attribute} = {value!r}, which is not a mapping from words to reasons; "
            f"write {attribute} = {{'word': 'the reason, and what to do instead'}}"
        )
    return dict(value)


def _refuse_unknown_trainers(trainers: tuple[str, ...]) -> None:
    if not trainers or not set(trainers) <= set(TRAINERS):
        raise ValueError(f"declares trainers = {trainers!r}; name one or more of {', '.join(TRAINERS)}")


def _refuse_unknown_rollout_outputs(outputs: tuple[str, ...]) -> None:
    if set(outputs) - {"entropy"}:
        raise ValueError(f"declares rollout_outputs = {outputs!r}; what it may name is 'entropy'")


def _refuse_itself_before_itself(declared: Declarations) -> None:
    if own := [word for word in declared.after if word in declared.provides]:
        raise ValueError(
            f"declares after = {{{own[0]!r}: ...}}, a word that it provides itself: of two such plugins one is always "
            "first; declare it under conflicts"
        )


def _refuse_half_a_state(plugin: Any) -> None:
    pair = ("state_dict", "load_state_dict")
    present = [name for name in pair if callable(getattr(plugin, name, None))]
    if len(present) == 1:
        (missing,) = set(pair) - set(present)
        raise ValueError(
            f"has {present[0]} without {missing}, so that its state would not survive a resume; add {missing}"
        )
