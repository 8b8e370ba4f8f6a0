"""Which columns a run carries: agreed between the plugins that declare them, and found in the data.

A column is looked for where the hooks that see it get their data from: in SFT the training and evaluation sets, in GRPO
and RLOO the prompts for `advantages`, and in every trainer the streams for `per_token_loss`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from trl_ext.errors import ConfigurationError, did_you_mean
from trl_ext.plugins.plugin_set import ActivePlugin, PluginSet
from trl_ext.records import Column, TrainerKind, trainer_name
from trl_ext.startup.column_values import COMPLETION_MASK, messages_of, values_of_turns

READERS: dict[TrainerKind, tuple[str, ...]] = {
    "sft": ("per_token_loss", "sample_weights", "auxiliary_losses"),
    "grpo": ("advantages",),
    "rloo": ("advantages",),
}
"""The hooks that see columns of the trainer's own data; in other trainers none does."""
STREAM_READERS = ("per_token_loss",)
"""The hooks that see columns of a stream's data."""


@dataclass(frozen=True)
class Wanted:
    """A column, and the first plugin that asks for it. Texts alone: `datasets` hashes what it maps with."""

    column: Column
    plugin: str
    """The plugin in words."""
    line: str
    """The config line to change."""


@dataclass(frozen=True)
class Columns:
    """The columns that a run carries."""

    data: tuple[Wanted, ...] = ()
    """With the trainer's own data."""
    streams: tuple[Wanted, ...] = ()
    """With the data of streams."""

    @property
    def by_name(self) -> dict[str, Column]:
        """All of them."""
        return {wanted.column.name: wanted.column for wanted in (*self.data, *self.streams)}


def wanted_columns(kind: TrainerKind, plugins: PluginSet) -> Columns:
    """What the active plugins declare, for the data that their hooks see.

    Raises:
        ConfigurationError: Two plugins ask for one column in different ways.
    """
    _agree(plugins)
    return Columns(_seen_by(READERS.get(kind, ()), plugins), _seen_by(STREAM_READERS, plugins))


def _agree(plugins: Iterable[ActivePlugin]) -> None:
    first: dict[str, Wanted] = {}
    for wanted in (wanted for plugin in plugins for wanted in _declared(plugin)):
        known = first.setdefault(wanted.column.name, wanted)
        if known.column != wanted.column:
            raise ConfigurationError(
                f"plugins {known.plugin} and {wanted.plugin} ask for the column {wanted.column.name!r} in different "
                f"ways, {known.column} and {wanted.column}. Change {known.line} or {wanted.line}"
            )


def _seen_by(hooks: Sequence[str], plugins: PluginSet) -> tuple[Wanted, ...]:
    readers = {name for hook in hooks for name, _ in plugins.calls(hook)}
    first: dict[str, Wanted] = {}
    for wanted in (wanted for plugin in plugins if plugin.name in readers for wanted in _declared(plugin)):
        first.setdefault(wanted.column.name, wanted)
    return tuple(first.values())


def _declared(plugin: ActivePlugin) -> list[Wanted]:
    return [Wanted(column, str(plugin), plugin.line) for column in plugin.declared.columns]


# -- what cannot work ------------------------------------------------------------------------------------------------


def refuse_columns(
    kind: TrainerKind,
    args: Any,
    columns: Columns,
    data: Mapping[str, Any],
    streams: Mapping[str, Any],
    collator: Any = None,
) -> None:
    """Refuse a run whose columns are not in the data, or would get lost on the way; before the model loads.

    Args:
        kind: The trainer.
        args: Its config.
        columns: What is carried.
        data: The trainer's data sets, by what they are called in messages.
        streams: The data sets of streams, likewise.
        collator: The collator that the trainer was given.

    Raises:
        ConfigurationError: It names the plugin, the column, and what to change.
    """
    for wanted in columns.data:
        if reason := _lost(kind, args, wanted.column, collator):
            raise ConfigurationError(f"plugin {wanted.plugin} reads the column {wanted.column.name!r}, {reason}")
    for name, dataset in data.items():
        refuse_data(columns.data, dataset, name, args)
    for name, dataset in streams.items():
        refuse_data(columns.streams, dataset, name, args)


def _lost(kind: TrainerKind, args: Any, column: Column, collator: Any) -> str:
    """Why a column would not arrive, with what to change; empty where it does."""
    if kind != "sft":
        if column.per != "sample":
            return f"with one value per {column.per}; the prompts of {trainer_name(kind)} have columns per sample only"
        return "which remove_unused_columns=True drops; set it to False" if args.remove_unused_columns else ""
    if (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        return "which is attached while TRL prepares the data; remove skip_prepare_dataset from dataset_kwargs"
    if collator is not None and type(collator) is not DataCollatorForLanguageModeling:
        return f"which a collator of your own ({type(collator).__name__}) would drop; leave out data_collator"
    return ""


def refuse_data(columns: Sequence[Wanted], dataset: Any, what: str, args: Any) -> None:
    """Refuse a data set that lacks a column, or has it in another form.

    All values of a column per sample are looked at where the data can be indexed, else those of the first row.

    Args:
        columns: What is to be carried.
        dataset: of `datasets`, or None.
        what: The data in words, for messages.
        args: The settings of its preparation.

    Raises:
        ConfigurationError: It names the plugin, the column and those that there are, or the row.
    """
    row = next(iter(dataset), None) if columns and dataset is not None else None
    if row is None:
        return  # of an empty data set TRL says so
    for wanted in columns:
        where = f"plugin {wanted.plugin} reads the column {wanted.column.name!r}, but"
        _refuse_row(wanted, row, f"{where} {what}", args)
        rows, check = _checks(wanted.column, dataset, row)
        for place, item in enumerate(rows):
            try:
                check(item)
            except ValueError as error:
                raise ConfigurationError(
                    f"{where} row {place} of {what} {error}. Mend it, or change {wanted.line}"
                ) from None


def _refuse_row(wanted: Wanted, row: Mapping[str, Any], where: str, args: Any) -> None:
    column, names = wanted.column, list(row)
    if column.per == "message":
        names += [key for message in messages_of(row) for key in message if key not in ("role", "content")]
        if "input_ids" not in row and not getattr(args, "assistant_only_loss", False):
            raise ConfigurationError(
                f"{where} is not trained on the assistant's turns alone, which the column has values for; "
                "set assistant_only_loss: true"
            )
    made = column.name == COMPLETION_MASK and {"prompt", "completion"} <= set(row)
    if column.name not in names and column.default is None and not made:
        raise ConfigurationError(
            f"{where} has only {', '.join(dict.fromkeys(names))}. {did_you_mean(column.name, names)}"
            f"Rename a column with dataset_columns, or change {wanted.line}"
        )
    if images := sorted({"image", "images"}.intersection(row)):
        raise ConfigurationError(f"{where} has {images[0]!r}, and columns are carried with text alone")


def _checks(column: Column, dataset: Any, row: Mapping[str, Any]) -> tuple[Iterable[Any], Callable[[Any], Any]]:
    """What to look at, all rows of a column per sample and the first row of another, and what raises for a fault."""
    if column.per == "sample":
        known = isinstance(dataset, Dataset) and column.name in dataset.column_names
        return dataset[column.name] if known else [row.get(column.name)], column.encode
    if column.per == "message":
        return [row], lambda row: [column.encode(value) for value in values_of_turns(column, row)]
    return [row.get(column.name) or []], lambda values: [column.encode(value) for value in values]
