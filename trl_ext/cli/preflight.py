"""What can be known to fail before the model loads: data, splits, columns, model, rewards, checkpoint, folder."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trl_ext.data import FILE_FORMATS, explain_loading, nearest_path, refuse_missing_file, rename_columns
from trl_ext.errors import ConfigurationError, did_you_mean
from trl_ext.records import trainer_name

USUAL_COLUMNS = {
    "prompt": ("question", "instruction", "query", "problem", "input"),
    "completion": ("answer", "response", "output", "solution", "reply"),
    "messages": ("conversation", "dialog", "chat"),
    "text": ("content", "document"),
    "chosen": ("preferred", "accepted", "winner"),
    "rejected": ("dispreferred", "refused", "loser"),
    "label": ("desirable", "thumbs_up"),
}
"""The columns that TRL reads, and under what names data sets often have them."""
ACCEPTED = {
    "sft": (("prompt", "completion"), ("messages",), ("conversations",), ("text",), ("input_ids",)),
    "grpo": (("prompt",),),
    "dpo": (("chosen", "rejected"),),
    "kto": (("completion", "label"), ("chosen", "rejected")),
    "rloo": (("prompt",),),
    "reward": (("chosen", "rejected"), ("chosen_ids", "rejected_ids"), ("chosen_input_ids", "rejected_input_ids")),
    "distillation": (("prompt",),),
}
"""The groups of columns of which TRL's trainer wants one."""
WANTED = {
    "sft": "`prompt` and `completion`, or `messages`, or `text`",
    "kto": "`completion` and `label`, or `chosen` and `rejected`",
    **dict.fromkeys(("dpo", "reward"), "`chosen` and `rejected`"),
    **dict.fromkeys(("grpo", "rloo", "distillation"), "`prompt`"),
}
"""The same in words, without what is tokenized already."""


def check_settings(kind: str, script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Refuse settings that name what is not there, each with the setting to change.

    Args:
        kind: The training command.
        script_args, training_args, model_args, dataset_args: TRL's settings.

    Raises:
        ConfigurationError: The model, the data, a split, a column, a reward or a checkpoint does not exist.
    """
    _check_folder(training_args)
    trust = training_args.trust_remote_code
    _check_model("model_name_or_path", model_args.model_name_or_path, model_args.model_revision, trust)
    if kind == "distillation":
        teacher, revision = training_args.teacher_model_name_or_path, training_args.teacher_model_revision
        _check_model("teacher_model_name_or_path", teacher, revision, trust)
    if hasattr(script_args, "reward_funcs"):
        _check_rewards(script_args)
    splits = _load(script_args, dataset_args)
    used = {"dataset_train_split": script_args.dataset_train_split}
    if training_args.eval_strategy != "no":
        used["dataset_test_split"] = script_args.dataset_test_split
    for setting, name in used.items():
        _check_split(splits, name, setting, training_args, dataset_args)
        _check_columns(kind, rename_columns(splits[name], training_args.dataset_columns), name, training_args)


# -- the run ---------------------------------------------------------------------------------------------------------


def _check_folder(training_args: Any) -> None:
    folder = Path(training_args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"output_dir: {str(folder)!r} is a file; name a folder")
    resume = training_args.resume_from_checkpoint
    if not resume:
        return
    if str(resume).lower() == "true":
        if not any(folder.glob("checkpoint-*")):
            raise ConfigurationError(
                f"resume_from_checkpoint: there is no checkpoint in output_dir {str(folder)!r}; start without it, or "
                "set output_dir to the folder of the run to resume"
            )
    elif not Path(resume).is_dir():
        hint = nearest_path(Path(resume)) or "true takes the newest checkpoint of output_dir"
        raise ConfigurationError(f"resume_from_checkpoint: there is no folder {resume!r}. {hint}".rstrip())


def _check_model(setting: str, name: str | None, revision: str | None, trust_remote_code: bool) -> None:
    from transformers import AutoConfig

    if not name:
        raise ConfigurationError(f"{setting}: is not set; give a hub id or a folder with a model")
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigurationError(f"{setting}: {name!r} holds no model (no config.json). {_instead(path)}")
    if path.is_file():
        raise ConfigurationError(f"{setting}: {name!r} is a file; name the folder that holds the model")
    try:
        AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if path.is_dir() or isinstance(error, ValueError):
            raise ConfigurationError(f"{setting}: {name!r} cannot be read: {error}") from None
        raise ConfigurationError(
            f"{setting}: {name!r} is no folder here, and cannot be had from the hub. "
            f"{nearest_path(path) or _first_sentence(error)}"
        ) from None


def _instead(path: Path) -> str:
    """What to name in place of a folder without a model."""
    checkpoints = sorted(path.glob("checkpoint-*/config.json"), key=lambda file: file.stat().st_mtime)
    if checkpoints:
        return f"Did you mean {str(checkpoints[-1].parent)!r}?"
    if (path / "adapter_config.json").is_file():
        return "It is an adapter: name its base model, or merge the adapter first"
    return "Name a folder that a model was saved to"


def _check_rewards(script_args: Any) -> None:
    """The reward functions as TRL's script will look for them; an error in their module is its author's."""
    known = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "get_soft_overlong_punishment")
    if not script_args.reward_funcs and not script_args.reward_model_name_or_path:
        raise ConfigurationError(f"reward_funcs: is not set; give package.module.function or one of {', '.join(known)}")
    for name in script_args.reward_funcs or ():
        module, _, function = name.rpartition(".")
        if name in known:
            continue
        if not module:
            hint = did_you_mean(name, known) or f"Known are {', '.join(known)} and package.module.function"
            raise ConfigurationError(f"reward_funcs: there is no reward {name!r}. {hint}".rstrip())
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))  # as TRL's script does
        if not _exists(module):
            near = did_you_mean(module, (file.stem for file in Path.cwd().glob("*.py")))
            raise ConfigurationError(f"reward_funcs: there is no module {module!r}. {near}".rstrip())
        loaded = import_module(module)
        if not hasattr(loaded, function):
            near = did_you_mean(function, dir(loaded))
            raise ConfigurationError(f"reward_funcs: module {module!r} has no {function!r}. {near}".rstrip())


def _exists(module: str) -> bool:
    """Whether there is a module of this name, whatever happens when it is imported."""
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        try:
            if find_spec(".".join(parts[:end])) is None:
                return False
        except (ModuleNotFoundError, ValueError):
            return False
    return True


# -- the data --------------------------------------------------------------------------------------------------------


def _load(script_args: Any, dataset_args: Any) -> Mapping[str, Any]:
    """The splits as TRL's script will load them; what is loaded here comes from the cache there."""
    from datasets import load_dataset
    from trl import get_dataset

    if dataset_args.datasets:
        for part in dataset_args.datasets:
            if part.path in FILE_FORMATS.values() and isinstance(part.data_files, str) and "*" not in part.data_files:
                refuse_missing_file(Path(part.data_files), "datasets")
        named = ", ".join(str(part.data_files or part.path) for part in dataset_args.datasets)
        with explain_loading(f"the data {named!r}"):
            return get_dataset(dataset_args)
    name = script_args.dataset_name
    if not name:
        raise ConfigurationError(
            "dataset_name: is not set; give a hub id, a folder, or a .jsonl, .csv or .parquet file"
        )
    near = "" if Path(name).exists() else nearest_path(Path(name))
    with explain_loading(f"dataset_name: {name!r}{near and f' ({near})'}"):
        return load_dataset(name, name=script_args.dataset_config, streaming=script_args.dataset_streaming)


def _check_split(splits: Mapping[str, Any], name: str, setting: str, training_args: Any, dataset_args: Any) -> None:
    if name not in splits:
        change = did_you_mean(name, splits) + f"Set {setting} to one of {', '.join(splits)}"
        if setting == "dataset_test_split":
            change += ", or test_split_size: 0.1" if dataset_args.datasets else ""
            change += f", or eval_strategy: no (it is {training_args.eval_strategy.value}, which evaluates)"
        raise ConfigurationError(f"{setting}: the data has no split {name!r}. {change}")
    if hasattr(splits[name], "__len__") and len(splits[name]) == 0:
        what = "training" if setting == "dataset_train_split" else "evaluation"
        raise ConfigurationError(f"{setting}: the {what} set (split {name!r}) is empty")


def _check_columns(kind: str, dataset: Any, split: str, training_args: Any) -> None:
    columns = dataset.column_names
    if columns is None:  # streamed, and known only once it is read
        return
    text = getattr(training_args, "dataset_text_field", "text")
    known = {"text" if column == text else column for column in columns}
    groups = ACCEPTED[kind]
    if any(set(group) <= known for group in groups):
        return
    read = {column for group in groups for column in group}
    usual = {new: names for new, names in USUAL_COLUMNS.items() if new in read}
    found = [f"{old}={new}" for new, names in usual.items() for old in names if old in columns]
    example = ",".join(found or [f"{usual[new][0]}={new}" for new in groups[0]])
    raise ConfigurationError(
        f"dataset_columns: the split {split!r} has the columns {', '.join(columns)}, and {trainer_name(kind)} wants "
        f"{WANTED[kind]}. Rename them, for instance dataset_columns: {example}"
    )


def _first_sentence(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
