"""From the constructor's arguments to a prepared model: activation, start-up checks, streams, `setup`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import IterableDataset
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from trl.trainer.utils import get_callable_name

from trl_ext.config import upgrade_config
from trl_ext.data import load_dataset_spec, rename_columns
from trl_ext.engine.guard import Guard
from trl_ext.engine.streams import match_streams, prepare_stream
from trl_ext.engine.tally import LossTally
from trl_ext.errors import ConfigurationError
from trl_ext.gradients import trainable_parameters
from trl_ext.plugins.activation import activate
from trl_ext.records import RunDescription, SetupContext, StreamRequest, WeightsView
from trl_ext.startup.refusals import refuse_unsupported, sharding_of
from trl_ext.startup.report import print_header, write_run_file
from trl_ext.trainers.base import Opened
from trl_ext.trainers.callback import StepCallback


class SetupMixin(Opened):
    """Wraps construction, the optimiser's creation and the model's preparation."""

    _ext_optimizer: torch.optim.Optimizer | None = None

    def __init__(
        self, *args: Any, plugins: list[Any] | None = None, streams: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        bound = inspect.signature(super().__init__).bind_partial(*args, **kwargs).arguments
        config = bound["args"] = self._ext_config(bound)
        self.ext_plugins = activate(config.plugins, plugins or (), trainer=self.ext_kind)
        datasets = {role: load_dataset_spec(spec, f"streams: {role}") for role, spec in (config.streams or {}).items()}
        datasets.update(streams or {})
        if config.dataset_columns:
            for name in ("train_dataset", "eval_dataset"):
                bound[name] = _renamed(bound.get(name), config.dataset_columns)
        requests = self._ext_check(bound, config, datasets)
        self.ext_fused_outputs = tuple(
            dict.fromkeys(name for p in self.ext_plugins for name in getattr(p.instance, "fused_outputs", ()))
        )
        self.ext_nonfinite = config.nonfinite or ("raise" if self.ext_plugins else "ignore")

        super().__init__(**bound)

        device, world = self.accelerator.device, self.accelerator.num_processes
        self.ext_guard = Guard(self.ext_plugins, device, world, lambda: self.state.global_step)
        self.ext_tally = LossTally(device)
        self.ext_streams = {role: prepare_stream(self, *request) for role, request in requests.items()}
        if self.ext_plugins or config.rank_check_steps:
            self.add_callback(StepCallback(self))
        self._ext_add_fused_outputs()

    # -- construction ------------------------------------------------------------------------------------------------

    def _ext_config(self, bound: Mapping[str, Any]) -> Any:
        args = bound.get("args")
        if args is None and "model" in bound:
            model = bound["model"]
            name = model if isinstance(model, str) else model.config._name_or_path
            args = self.ext_config_class(f"{name.split('/')[-1]}-{self.ext_kind.upper()}")
        return upgrade_config(args, self.ext_config_class)

    def _ext_check(
        self, bound: Mapping[str, Any], config: Any, datasets: Mapping[str, Any]
    ) -> dict[str, tuple[str, StreamRequest, Any]]:
        """Everything that can be refused before the model loads; gives the streams to prepare, by role."""
        if not self.ext_plugins and not datasets:
            return {}
        model, dataset = bound.get("model"), bound.get("train_dataset")
        run = RunDescription(
            trainer=self.ext_kind,
            args=config,
            model=model,
            plugins=self.ext_plugins.names,
            streams=tuple(datasets),
            columns=tuple(getattr(dataset, "column_names", None) or ()),
            peft=bound.get("peft_config") is not None or (isinstance(model, nn.Module) and is_peft_model(model)),
            world_size=config.world_size,
            sharding=sharding_of(config, model),
            rewards=_reward_names(bound),
        )
        refuse_unsupported(
            run, self.ext_plugins, bound.get("compute_loss_func"), streaming=isinstance(dataset, IterableDataset)
        )
        for plugin, call in self.ext_plugins.calls("check"):
            try:
                call(run=run)
            except Exception as error:
                raise ConfigurationError(f"plugin '{plugin}' refuses this run: {error}") from error
        requests = {}
        for plugin, call in self.ext_plugins.calls("streams"):
            try:
                requests[plugin] = list(call())
            except Exception as error:
                raise ConfigurationError(f"plugin '{plugin}' failed in hook 'streams': {error}") from error
        matched = match_streams(requests, datasets)
        owner = self.ext_plugins.owner("per_token_loss")
        if self.ext_kind == "grpo" and owner is not None and not matched:
            raise ConfigurationError(
                f"plugin '{owner}' owns the loss per token of supervised data, and this GRPO run has none: give a "
                "plugin that takes a stream its data under `streams:`, or remove this one"
            )
        return matched

    def _ext_add_fused_outputs(self) -> None:
        """Ask TRL's head for more outputs than the trainer needs (SFT); GRPO has a head of its own for streams."""

    # -- what streams and extra passes need of the trainer -----------------------------------------------------------

    def ext_base_model(self) -> nn.Module:
        """The model that carries TRL's fused head: without PEFT's wrapper."""
        return self.model.get_base_model() if is_peft_model(self.model) else self.model

    @contextmanager
    def ext_sft_head(self) -> Iterator[None]:
        """A context in which the fused head gives plain SFT log-probabilities."""
        yield

    def ext_to_device(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """A batch on the training device, as transformers' trainer would put it there."""
        return self._prepare_input(dict(inputs))

    # -- preparation -------------------------------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        # A second `train()` comes here again, with the optimiser already ours, perhaps inside accelerate's wrapper.
        ours = self._ext_optimizer is getattr(optimizer, "optimizer", optimizer)
        if self.ext_plugins.implements("wrap_optimizer") and not ours:

            def check(result: Any) -> None:
                if not isinstance(result, torch.optim.Optimizer):
                    raise TypeError(f"returned a {type(result).__name__} instead of a torch.optim.Optimizer")

            self.optimizer = self._ext_optimizer = self.ext_guard.chain("wrap_optimizer", "optimizer", optimizer, check)
        return self.optimizer

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.ext_plugins:
            self._ext_setup(max_steps, resume_from_checkpoint)
            if self.accelerator.is_main_process:
                print_header(self)
                write_run_file(self)
        return prepared

    def _ext_setup(self, max_steps: int, checkpoint: str | None) -> None:
        model = self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)
        named = trainable_parameters(model)
        sharded = any(isinstance(p, DTensor) for p in named.values())
        self._ext_refuse_wrapper(named)
        self.ext_weights = WeightsView(tuple(named), tuple(named.values()), dict(model.named_buffers()), sharded)
        self.ext_prepared = True
        reference = getattr(self, "ref_model", None)
        context = SetupContext(
            trainer=self.ext_kind,
            model=model,
            weights=self.ext_weights,
            names=self.ext_weights.names,
            device=self.accelerator.device,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            sharded=sharded,
            gradient_accumulation_steps=self.args.gradient_accumulation_steps,
            max_steps=max_steps,
            output_dir=self.args.output_dir,
            resuming=checkpoint is not None,
            tokenizer=self.processing_class,
            reference=None if reference is None else self.accelerator.unwrap_model(reference),
        )
        self.ext_guard.run_all("setup", context=context)
        self.ext_guard.agree()
        if checkpoint is not None:
            self.ext_load_state(checkpoint)

    def _ext_refuse_wrapper(self, named: Mapping[str, nn.Parameter]) -> None:
        """What only the wrapped model shows."""
        if not self.ext_streams and not self.ext_plugins.implements("sample_weights"):
            return
        where = "streams and sample weights swap gradients, which"
        if isinstance(self.model_wrapped, DistributedDataParallel) and self.model_wrapped.gradient_as_bucket_view:
            raise ConfigurationError(f"{where} DDP's gradient_as_bucket_view=True corrupts; set it to False")
        if any(isinstance(p, DTensor) and p.device_mesh.ndim > 1 for p in named.values()):
            raise ConfigurationError(f"{where} is not supported on a mesh of several dimensions (HSDP)")


def _renamed(dataset: Any, columns: Mapping[str, str]) -> Any:
    if isinstance(dataset, Mapping):
        return {name: rename_columns(part, columns) for name, part in dataset.items()}
    return None if dataset is None else rename_columns(dataset, columns)


def _reward_names(bound: Mapping[str, Any]) -> tuple[str, ...]:
    """The names that TRL will give the reward functions; none where models or an environment are among them."""
    functions = bound.get("reward_funcs")
    functions = functions if isinstance(functions, list) else [functions]
    plain = all(callable(function) and not isinstance(function, nn.Module) for function in functions)
    known = plain and bound.get("environment_factory") is None
    return tuple(map(get_callable_name, functions)) if known else ()
