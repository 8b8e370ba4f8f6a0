"""`SFTConfig`, `GRPOConfig` and the other configs: TRL's, with the settings of the plugin layer."""

import os
from dataclasses import dataclass, field, fields
from functools import cache
from inspect import formatannotation
from typing import Any

import trl
from transformers import TrainingArguments

from trl_ext.data import parse_columns, parse_streams
from trl_ext.errors import ConfigurationError
from trl_ext.options import masked
from trl_ext.specs import PLUGINS_VARIABLE, parse_specs

NONFINITE = ("raise", "skip", "ignore")
RESUME_CHANGES = ("refuse", "warn")

# No `from __future__ import annotations` here: TRL's parser reads the annotations of these fields.


@dataclass
class _PluginSettings:
    """The fields that all configs add, after TRL's own, so that positional arguments keep their meaning."""

    plugins: list[str] | None = field(
        default=None,
        metadata={
            "help": "Plugins to activate, in order: names with options, `power:alpha=10 ema:decay=0.999`, or JSON; in "
            "YAML also mappings with the key `name`. If not set, the environment variable TRL_EXT_PLUGINS is read."
        },
    )
    streams: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Named auxiliary data sets for plugins that want one: `general=data.jsonl`, or a mapping (JSON on "
            "the command line) from name to a path or to a mapping with `path`, `name`, `split`, `data_files`, "
            "`data_dir` and `columns`."
        },
    )
    dataset_columns: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Columns of the training and evaluation data to rename, old to new: "
            "`question=prompt,answer=completion`, or a mapping (JSON on the command line)."
        },
    )
    nonfinite: str | None = field(
        default=None,
        metadata={
            "help": "What to do about a NaN or infinite gradient before the optimiser's step: `raise` stops all ranks, "
            "`skip` leaves out the step on all ranks, `ignore` does as TRL does. If not set, `raise` when plugins are "
            "active, and `ignore` otherwise.",
            "choices": list(NONFINITE),
        },
    )
    rank_check_steps: int = field(
        default=0,
        metadata={
            "help": "Compare hashes of the parameters and of the plugins' state across ranks every so many optimiser "
            "steps, and stop when they differ; 0 never compares."
        },
    )
    reset_plugin_state: bool = field(
        default=False,
        metadata={
            "help": "Whether to start plugins afresh when a checkpoint's plugin state is missing, corrupt or of other "
            "plugins, instead of refusing to resume."
        },
    )
    resume_changes: str = field(
        default="refuse",
        metadata={
            "help": "What to do when a run that resumes differs from the one that wrote the checkpoint in what changes "
            "its course: its plugins, their options or order, its training data or the order of it, its streams. "
            "`refuse` stops before anything is trained, `warn` says so and goes on. Another learning rate or batch "
            "size is only reported.",
            "choices": list(RESUME_CHANGES),
        },
    )
    verify_checkpoint: bool = field(
        default=True,
        metadata={
            "help": "Whether to compare the checksum of every file of a checkpoint that plugins were active in before "
            "resuming from it. It takes about as long as reading the files."
        },
    )
    strict_versions: bool = field(
        default=False,
        metadata={
            "help": "Whether to refuse releases of TRL, transformers, accelerate or PEFT in which the places that "
            "trl_ext relies on were not reviewed, instead of warning of them."
        },
    )

    profile: bool = field(
        default=False,
        metadata={
            "help": "Whether to trace three of the first optimiser steps with torch's profiler, in which every call of "
            "a plugin's hook is a range with its name, into the folder `profile` of the run, and to print what each "
            "took."
        },
    )

    def __post_init__(self) -> None:
        self._read_plugin_settings()
        super().__post_init__()  # type: ignore[misc]  # TRL's, in the classes below

    def to_dict(self) -> dict[str, Any]:
        """As TRL's, which trackers keep, with the secrets among the options of plugins masked as tokens are there."""
        settings: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return settings | {"plugins": masked(settings["plugins"])}

    def _read_plugin_settings(self) -> None:
        """Bring the fields to their canonical form: what is saved with a run reads back as the same."""
        self.plugins = parse_specs(  # type: ignore[assignment]  # a list of mappings, which TRL's parser has no type for
            os.environ.get(PLUGINS_VARIABLE) if self.plugins is None else self.plugins
        )
        self.streams = parse_streams(self.streams)
        self.dataset_columns = parse_columns(self.dataset_columns)
        if self.nonfinite is not None and self.nonfinite not in NONFINITE:
            raise ConfigurationError(f"nonfinite: {self.nonfinite!r} is not one of {', '.join(NONFINITE)}")
        if self.resume_changes not in RESUME_CHANGES:
            raise ConfigurationError(
                f"resume_changes: {self.resume_changes!r} is not one of {', '.join(RESUME_CHANGES)}"
            )
        if self.rank_check_steps < 0:
            raise ConfigurationError(
                f"rank_check_steps: {self.rank_check_steps} is negative; 0 switches the comparison off"
            )


def _documentation(of: str) -> str:
    settings = "\n".join(
        f"        {setting.name} (`{formatannotation(setting.type)}`):\n            {setting.metadata['help']}"
        for setting in fields(_PluginSettings)
    )
    return f"""
    [`trl.{of}`] with the settings of the plugin layer. Every argument of TRL's keeps its place and meaning.

    Parameters:
{settings}
    """


@dataclass
class SFTConfig(_PluginSettings, trl.SFTConfig):
    __doc__ = _documentation("SFTConfig")


@dataclass
class GRPOConfig(_PluginSettings, trl.GRPOConfig):
    __doc__ = _documentation("GRPOConfig")


@dataclass
class DPOConfig(_PluginSettings, trl.DPOConfig):
    __doc__ = _documentation("DPOConfig")


@dataclass
class KTOConfig(_PluginSettings, trl.KTOConfig):
    __doc__ = _documentation("KTOConfig")


@dataclass
class RLOOConfig(_PluginSettings, trl.RLOOConfig):
    __doc__ = _documentation("RLOOConfig")


@dataclass
class RewardConfig(_PluginSettings, trl.RewardConfig):
    __doc__ = _documentation("RewardConfig")


@dataclass
class DistillationConfig(_PluginSettings, trl.DistillationConfig):
    __doc__ = _documentation("DistillationConfig")


def upgrade_config(args: Any, config_cls: type[Any]) -> Any:
    """Give the config that a trainer of ours runs with, for any that TRL's trainer accepts.

    A TRL config keeps its values as they are: its `__post_init__`, which has derived some of them from others, does not
    run again. An instance of a user's subclass of TRL's config stays one.

    Args:
        args: Ours (returned as it is), TRL's config of the same trainer or a subclass, `TrainingArguments`, or None.
        config_cls: The trainer's config of this module.

    Raises:
        ConfigurationError: `args` is something else.
    """
    if isinstance(args, config_cls):
        return args
    trl_cls = next(base for base in config_cls.__mro__ if base.__module__.startswith("trl."))
    if isinstance(args, trl_cls):
        upgraded = _new_config(config_cls, type(args))
        settings = {f.name: f.default for f in fields(_PluginSettings)}
        vars(upgraded).update(settings | vars(args))
        upgraded._read_plugin_settings()
        return upgraded
    if args is None:
        return config_cls()
    if isinstance(args, TrainingArguments):
        return config_cls(**(args.to_dict() | {"hub_token": args.hub_token}))  # to_dict hides the token
    raise ConfigurationError(f"args: {type(args).__name__} is no config of this trainer; pass a {config_cls.__name__}")


@cache
def _combined(config_cls: Any, user_cls: Any) -> Any:
    """A user's subclass of TRL's config, with our fields added; its pickles name the two classes it is made of."""
    if issubclass(config_cls, user_cls):
        return config_cls

    def reduce(self: Any) -> Any:
        return _new_config, (config_cls, user_cls), vars(self)

    body = {"__reduce__": reduce, "__doc__": user_cls.__doc__, "__module__": user_cls.__module__}
    return dataclass(type(user_cls.__name__, (user_cls, config_cls), body))


def _new_config(config_cls: Any, user_cls: Any) -> Any:
    return object.__new__(_combined(config_cls, user_cls))
