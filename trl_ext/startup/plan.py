"""From the constructor's arguments to a run that can work: what it activates, what data it needs, what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from accelerate import Accelerator
from accelerate.utils import is_peft_model
from datasets import IterableDataset
from torch import nn
from trl.trainer.utils import get_callable_name

from trl_ext.config import upgrade_config
from trl_ext.data import load_dataset_spec, rename_columns
from trl_ext.errors import ConfigurationError
from trl_ext.hookspecs import HOOKS
from trl_ext.plugins.activation import activate
from trl_ext.plugins.plugin_set import PluginSet
from trl_ext.records import RunDescription, StreamRequest, TrainerKind, trainer_name
from trl_ext.startup.agreement import agreed
from trl_ext.startup.columns import Columns, refuse_columns, wanted_columns
from trl_ext.startup.precision import low_precision_settings
from trl_ext.startup.refusals import refuse_skipping, refuse_unsupported
from trl_ext.startup.sharding import sharding_of, sharding_of_loaded
from trl_ext.startup.stream_data import Matched, match_streams
from trl_ext.startup.unsupported import refuse_declared
from trl_ext.startup.versions import check_versions
from trl_ext.startup.zero import refuse_zero


class CheckRefusalError(ConfigurationError):
    """A plugin's `check` hook has refused the run."""


@dataclass(frozen=True)
class RunPlan:
    """A run that nothing speaks against, before the model loads."""

    arguments: Mapping[str, Any]
    """Of TRL's constructor, with a config of ours and columns renamed."""
    plugins: PluginSet
    streams: Matched
    """The auxiliary data sets to prepare."""
    columns: Columns = field(default_factory=Columns)
    """What is carried beside the tokens."""
    run: RunDescription | None = None
    """What the refusals and the `check` hooks were asked about; None where nothing is active."""

    @property
    def fused_outputs(self) -> tuple[str, ...]:
        """Outputs that plugins want of the fused head, beside those that TRL's trainer asks for."""
        return tuple(dict.fromkeys(name for plugin in self.plugins for name in plugin.declared.fused_outputs))


def plan_run(
    kind: TrainerKind,
    config_class: type[Any],
    given: Mapping[str, Any],
    instances: Sequence[Any],
    streams: Mapping[str, Any],
) -> RunPlan:
    """Activate, load and check everything that does not need the model.

    `given` are the arguments of TRL's constructor, `instances` and `streams` what the caller passed beside the config.

    Raises:
        ConfigurationError: for anything that cannot work, on every rank; it names the line to change.
    """
    config = _config(config_class, given)
    _ = config.world_size  # connects the ranks
    with agreed():
        check_versions(config.strict_versions, config.process_index == 0)
        return _plan(kind, config, given, instances, streams)


def _plan(
    kind: TrainerKind, config: Any, given: Mapping[str, Any], instances: Sequence[Any], streams: Mapping[str, Any]
) -> RunPlan:
    refuse_skipping(config, sharding_of(config, given.get("model")))
    plugins = activate(config.plugins, instances, trainer=kind)
    described = config.streams or {}
    datasets = {role: load_dataset_spec(spec, f"streams: {role}") for role, spec in described.items()} | dict(streams)
    arguments = {**given, "args": config}
    if config.dataset_columns:
        for name in ("train_dataset", "eval_dataset"):
            arguments[name] = _renamed(arguments.get(name), config.dataset_columns)
    if not plugins and not datasets:
        return RunPlan(arguments, plugins, {})
    run = _description(kind, config, arguments, plugins, datasets)
    _refuse(run, plugins, arguments)
    columns = wanted_columns(kind, plugins)
    named_streams = {f"stream {role!r}": dataset for role, dataset in datasets.items()}
    refuse_columns(kind, config, columns, _named_data(arguments), named_streams, arguments.get("data_collator"))
    _check(run, plugins)
    return RunPlan(arguments, plugins, _streams(kind, plugins, datasets), columns, run)


def check_loaded(plan: RunPlan, accelerator: Accelerator, model: nn.Module) -> None:
    """Refuse again, now that the model is there: it may be sharded in ways that no setting has shown.

    Raises:
        ConfigurationError: as `plan_run`.
    """
    if plan.run is None:
        return
    loaded = replace(plan.run, model=model, sharding=sharding_of_loaded(accelerator, model))
    with agreed():
        if loaded.sharding == "deepspeed":
            refuse_zero(accelerator.deepspeed_plugin.deepspeed_config, plan.plugins)
        _refuse(loaded, plan.plugins, plan.arguments)
        if loaded.sharding != plan.run.sharding:
            _check(loaded, plan.plugins)


def _refuse(run: RunDescription, plugins: PluginSet, arguments: Mapping[str, Any]) -> None:
    streaming = isinstance(arguments.get("train_dataset"), IterableDataset)
    refuse_unsupported(run, plugins, arguments.get("compute_loss_func"), streaming=streaming)
    refuse_declared(run, plugins)


def _check(run: RunDescription, plugins: PluginSet) -> None:
    for plugin, call in plugins.calls("check"):
        try:
            call(run=run)
        except Exception as error:
            raise CheckRefusalError(f"plugin '{plugin}' refuses this run: {error}") from error


def _config(config_class: type[Any], given: Mapping[str, Any]) -> Any:
    args, model = given.get("args"), given.get("model")
    if args is None and "model" in given:  # named as TRL names it
        name = model if isinstance(model, str) else model.config._name_or_path  # type: ignore[union-attr]
        args = config_class(f"{name.split('/')[-1]}-{config_class.__name__.removesuffix('Config')}")
    return upgrade_config(args, config_class)


def _description(
    kind: TrainerKind, config: Any, arguments: Mapping[str, Any], plugins: PluginSet, datasets: Mapping[str, Any]
) -> RunDescription:
    model = arguments.get("model")
    return RunDescription(
        trainer=kind,
        args=config,
        model=model,
        plugins=plugins.names,
        streams=tuple(datasets),
        columns=tuple(getattr(arguments.get("train_dataset"), "column_names", None) or ()),
        peft=arguments.get("peft_config") is not None or (isinstance(model, nn.Module) and is_peft_model(model)),
        world_size=config.world_size,
        sharding=sharding_of(config, model),
        rewards=_reward_names(arguments),
        low_precision=low_precision_settings(config, model),
    )


def _streams(kind: TrainerKind, plugins: PluginSet, datasets: Mapping[str, Any]) -> Matched:
    requests = {}
    for plugin, call in plugins.calls("streams"):
        try:
            requests[plugin] = list(call())
        except Exception as error:
            raise ConfigurationError(f"plugin '{plugin}' failed in hook 'streams': {error}") from error
    if kind not in HOOKS["streams"].trainers:
        _refuse_streams(kind, requests, datasets)
        return {}
    matched = match_streams(requests, datasets)
    owner = plugins.owner("per_token_loss")
    if kind != "sft" and owner is not None and not matched:
        raise ConfigurationError(
            f"plugin '{owner}' owns the loss per token of supervised data, and this {trainer_name(kind)} run has none: "
            "give a plugin that takes a stream its data under `streams:`, or remove this one"
        )
    return matched


def _refuse_streams(
    kind: TrainerKind, requests: Mapping[str, Sequence[StreamRequest]], datasets: Mapping[str, Any]
) -> None:
    why = f"and the model of the trainer {kind} has no language-model head to run SFT data on"
    for plugin, wanted in requests.items():
        if roles := [request.role for request in wanted if not request.optional]:
            raise ConfigurationError(f"plugin '{plugin}' asks for the stream '{roles[0]}', {why}; remove the plugin")
    if datasets:
        raise ConfigurationError(f"streams: {', '.join(datasets)} is given, {why}; remove it")


def _named_data(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The trainer's data sets, under the names that messages have for them."""
    held_out = arguments.get("eval_dataset")
    several = held_out if isinstance(held_out, Mapping) else {}
    data = {"the training data": arguments.get("train_dataset")}
    data |= {f"the evaluation data {name!r}": dataset for name, dataset in several.items()}
    return data if several else data | {"the evaluation data": held_out}


def _renamed(dataset: Any, columns: Mapping[str, str]) -> Any:
    if isinstance(dataset, Mapping):
        return {name: rename_columns(part, columns) for name, part in dataset.items()}
    return None if dataset is None else rename_columns(dataset, columns)


def _reward_names(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """The names that TRL will give the reward functions; none where models or an environment are among them."""
    functions = arguments.get("reward_funcs")
    functions = functions if isinstance(functions, list) else [functions]
    plain = all(callable(function) and not isinstance(function, nn.Module) for function in functions)
    known = plain and arguments.get("environment_factory") is None
    return tuple(map(get_callable_name, functions)) if known else ()
