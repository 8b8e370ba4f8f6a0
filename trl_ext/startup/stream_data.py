"""The data of streams: matched with what plugins ask for, and prepared as TRL's SFT would prepare it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from datasets import Dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.sft_trainer import SFTTrainer as TrlSFTTrainer

from trl_ext.engine.streams import Stream
from trl_ext.errors import ConfigurationError
from trl_ext.records import StreamRequest
from trl_ext.records.columns import CARRIED
from trl_ext.startup.carriage import collator_with_columns, prepare_with_columns
from trl_ext.startup.columns import Wanted


@dataclass(frozen=True)
class TextForm:
    """How the run turns text into batches; streams follow it."""

    args: Any
    """The trainer's config; what a GRPO config lacks of SFT's settings has SFT's default."""
    tokenizer: Any
    processing_class: Any
    """What the trainer was given: the tokenizer, or a processor around it."""
    chat_template: str | None = None
    padding_free: bool = False
    columns: tuple[Wanted, ...] = ()
    """What the streams carry beside the tokens."""


Matched = dict[str, tuple[str, StreamRequest, Any]]
"""Role to the plugin that asks first, its request, and the data set."""


def match_streams(requests: Mapping[str, list[StreamRequest]], datasets: Mapping[str, Any]) -> Matched:
    """Pair what plugins ask for with the data sets given, by role.

    Args:
        requests: plugin name to its requests.
        datasets: role to data set.

    Raises:
        ConfigurationError: a role without data, data that no plugin asks for, or two different requests for a role.
    """
    matched: Matched = {}
    for plugin, wanted in requests.items():
        for request in wanted:
            if request.role not in datasets:
                if request.optional:
                    continue
                given = ", ".join(sorted(datasets)) or "none"
                raise ConfigurationError(
                    f"plugin '{plugin}' needs an auxiliary data set for the role '{request.role}' (given: {given}); "
                    f"add `streams: {{{request.role}: path/to/data.jsonl}}` to the config, or pass "
                    f"`streams={{'{request.role}': dataset}}` to the trainer"
                )
            known = matched.get(request.role)
            if known is None:
                matched[request.role] = (plugin, request, datasets[request.role])
            elif known[1] != request:
                raise ConfigurationError(
                    f"two plugins ask for the stream '{request.role}' in different ways: {known[1]} and {request}"
                )
    unused = sorted(set(datasets) - set(matched))
    if unused:
        asked = ", ".join(sorted(matched)) or "none"
        raise ConfigurationError(
            f"no active plugin uses the stream(s) {', '.join(unused)} (roles asked for: {asked}); "
            "remove them from `streams`, or activate the plugin that reads them"
        )
    return matched


def prepare_stream(form: TextForm, plugin: str, request: StreamRequest, dataset: Any) -> Stream:
    """Tokenize a data set as TRL's SFT would, with labels on the completion where there is one.

    Works in GRPO too: TRL's preparation needs only a tokenizer, a template and a few options. Messages go through the
    template with GRPO's `chat_template_kwargs`, as the prompts of the rollouts do, and with those of a column.

    Raises:
        ConfigurationError: a streaming or empty data set, or one with images.
    """
    if not isinstance(dataset, Dataset):
        raise ConfigurationError(
            f"stream '{request.role}' is a {type(dataset).__name__}; streams need a `datasets.Dataset` with random "
            "access, since they shuffle and resume by position"
        )
    if len(dataset) == 0:
        raise ConfigurationError(f"stream '{request.role}' is empty")
    if images := sorted({"image", "images"}.intersection(dataset.column_names)):
        raise ConfigurationError(
            f"stream '{request.role}' has a column {images[0]!r}, but streams are of text alone; remove the column to "
            "train on the text without its images"
        )
    args = form.args
    options = _options(args, request, dataset)
    has_completion = "prompt" in dataset.column_names and "completion" in dataset.column_names
    wanted = getattr(args, "completion_only_loss", None)
    stand_in = SimpleNamespace(
        _tokenizer=form.tokenizer,
        chat_template=form.chat_template if options.assistant_only_loss else None,
        completion_only_loss=has_completion if wanted is None else wanted,
    )
    rows = _with_template_options(dataset, getattr(args, "chat_template_kwargs", None))
    what = f"stream '{request.role}'"

    def prepare(rows: Any, options: Any, packing: bool) -> Any:
        return TrlSFTTrainer._prepare_dataset(stand_in, rows, form.processing_class, options, packing, None, what)

    collate = DataCollatorForLanguageModeling(pad_token_id=form.tokenizer.pad_token_id, padding_free=form.padding_free)
    if form.columns:
        prepared = prepare_with_columns(prepare, rows, options, False, form.columns, what)
        collate = collator_with_columns(collate, form.columns)
    else:
        prepared = prepare(rows, options, False)
    if len(prepared) == 0:
        raise ConfigurationError(f"{what} has no sample with a label left after preparation")
    prepared = prepared.select_columns(["input_ids", "labels", *([CARRIED] if form.columns else [])])
    default_seed = args.data_seed if args.data_seed is not None else args.seed
    seed = default_seed if request.seed is None else request.seed
    return Stream(request, prepared, collate, seed, args.process_index, args.world_size, plugin)


def _options(args: Any, request: StreamRequest, dataset: Dataset) -> SimpleNamespace:
    """TRL's settings of the preparation. A namespace: building an `SFTConfig` here would reset accelerate's state."""
    return SimpleNamespace(
        dataset_num_proc=getattr(args, "dataset_num_proc", None),
        dataset_text_field=getattr(args, "dataset_text_field", "text"),
        assistant_only_loss=getattr(args, "assistant_only_loss", False) and "messages" in dataset.column_names,
        max_length=request.max_length if request.max_length is not None else getattr(args, "max_length", None),
        truncation_mode=getattr(args, "truncation_mode", "keep_start"),
        shuffle_dataset=False,
        seed=args.seed,
    )


def _with_template_options(dataset: Dataset, of_run: Mapping[str, Any] | None) -> Dataset:
    """The rows with the run's `chat_template_kwargs`, over which those of a row's own column win."""
    if not of_run:
        return dataset
    name = "chat_template_kwargs"
    of_rows = dataset[name] if name in dataset.column_names else [{}] * len(dataset)
    merged = [{**of_run, **(of_row or {})} for of_row in of_rows]
    kept = [column for column in dataset.column_names if column != name]
    return dataset.select_columns(kept).add_column(name, merged)
