"""What both trainers share: activation, hooks around TRL's training step, streams, the agreement before the optimiser.

The classes here only wrap methods of TRL and transformers, before or after; `trl_ext.seams` lists each of them.
Without plugins every override is a plain call to `super()`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, Literal

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from trl_ext.activation import ActivePlugin, PluginSet, activate
from trl_ext.config import upgrade_config
from trl_ext.data import load_dataset_spec, rename_columns
from trl_ext.divergence import compare_ranks
from trl_ext.errors import ConfigurationError
from trl_ext.gradients import GradientView, trainable_parameters
from trl_ext.guard import Guard
from trl_ext.records import RunDescription, SetupContext, StreamGradient, StreamRequest, TokenRecord, WeightsView
from trl_ext.refusals import refuse_unsupported, sharding_of
from trl_ext.report import print_header, write_run_file
from trl_ext.streams import Stream, match_streams, prepare_stream, stream_gradient
from trl_ext.tally import LossTally


class TrainerMixin:
    """Opens the hook points in a TRL trainer.

    Args:
        *args, **kwargs: those of the TRL trainer, under the same names.
        plugins: instances to activate after the plugins that `args.plugins` names.
        streams: role to auxiliary `datasets.Dataset`, in addition to those that `args.streams` names.

    Raises:
        ConfigurationError: before the model loads, for anything that cannot work.
    """

    ext_kind: ClassVar[Literal["sft", "grpo"]]
    ext_config_class: ClassVar[type]

    # Defaults on the class: TRL calls some methods on objects that were made without `__init__`.
    ext_plugins: PluginSet = PluginSet()
    ext_guard: Guard | None = None
    ext_streams: Mapping[str, Stream] = {}
    ext_fused_outputs: tuple[str, ...] = ()
    ext_weights: WeightsView
    _ext_sample_weights: list[Tensor] | None = None
    _ext_optimizer: torch.optim.Optimizer | None = None

    def __init__(
        self, *args: Any, plugins: list[Any] | None = None, streams: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        bound = inspect.signature(super().__init__).bind_partial(*args, **kwargs).arguments
        config = bound["args"] = self._ext_config(bound)
        self.ext_plugins = activate(config.plugins, plugins or (), trainer=self.ext_kind)
        datasets = {
            **{role: load_dataset_spec(spec) for role, spec in (config.streams or {}).items()},
            **(streams or {}),
        }
        if config.dataset_columns:
            for name in ("train_dataset", "eval_dataset"):
                bound[name] = _renamed(bound.get(name), config.dataset_columns)
        requests = self._ext_check(bound, config, datasets)
        self.ext_fused_outputs = tuple(
            dict.fromkeys(name for p in self.ext_plugins for name in getattr(p.instance, "fused_outputs", ()))
        )
        self._ext_nonfinite = config.nonfinite or ("raise" if self.ext_plugins else "ignore")

        super().__init__(**bound)

        device, world = self.accelerator.device, self.accelerator.num_processes
        self.ext_guard = Guard(self.ext_plugins, device, world, lambda: self.state.global_step)
        self.ext_streams = {role: prepare_stream(self, request, data) for role, (request, data) in requests.items()}
        self._ext_tally = LossTally(device)
        self._ext_micro_step = 0
        self._ext_before: dict[str, StreamGradient] = {}
        self._ext_finite = torch.ones((), dtype=torch.bool, device=device)
        self._ext_skipped = False
        self._ext_resumed_from: str | None = None
        if self.ext_plugins or config.rank_check_steps:
            self.add_callback(_StepCallback(self))
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
    ) -> dict[str, tuple[StreamRequest, Any]]:
        """Everything that can be refused before the model loads; gives the streams to prepare."""
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
        )
        refuse_unsupported(run, self.ext_plugins, bound.get("compute_loss_func"))
        for plugin, call in self.ext_plugins.calls("check"):
            try:
                call(run=run)
            except Exception as error:
                raise ConfigurationError(f"plugin '{plugin}' refuses this run: {error}") from error
        requests = {plugin: list(call()) for plugin, call in self.ext_plugins.calls("streams")}
        return match_streams(requests, datasets)

    def _ext_add_fused_outputs(self) -> None:
        """Ask TRL's head for more outputs than the trainer itself needs (SFT); GRPO has a head of its own for streams."""

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

    def ext_progress(self) -> float:
        """Share of the optimiser steps already done, in [0, 1]."""
        return self.state.global_step / max(self.state.max_steps, 1)

    # -- preparation -------------------------------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        # Called again by a second `train()`, when the optimiser is already ours, perhaps inside accelerate's wrapper.
        if self.ext_plugins.implements("wrap_optimizer") and self._ext_optimizer is not getattr(
            optimizer, "optimizer", optimizer
        ):

            def check(plugin: str, result: Any) -> None:
                if not isinstance(result, torch.optim.Optimizer):
                    raise TypeError(f"returned a {type(result).__name__} instead of a torch.optim.Optimizer")

            self.optimizer = self._ext_optimizer = self.ext_guard.chain("wrap_optimizer", optimizer, check)
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
        )
        self.ext_guard.run_all("setup", context=context)
        self.ext_guard.agree()
        if checkpoint is not None:
            self.ext_load_state(checkpoint)

    def _ext_refuse_wrapper(self, named: Mapping[str, nn.Parameter]) -> None:
        """What only the wrapped model shows."""
        wrapped = self.model_wrapped
        swaps = bool(self.ext_streams) or self.ext_plugins.implements("sample_weights")
        if swaps and isinstance(wrapped, DistributedDataParallel) and wrapped.gradient_as_bucket_view:
            raise ConfigurationError(
                "streams swap gradients, which gradient_as_bucket_view=True corrupts; set it False"
            )
        if swaps and any(isinstance(p, DTensor) and p.device_mesh.ndim > 1 for p in named.values()):
            raise ConfigurationError(
                "streams and sample weights are not supported on a mesh of several dimensions (HSDP)"
            )

    # -- one optimiser step ------------------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        samples, num_items = super().get_batch_samples(*args, **kwargs)
        # Only noted: on resume this runs before the random state is restored.
        self._ext_window, self._ext_num_items, self._ext_micro_step = samples, num_items, 0
        return samples, num_items

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if not self.ext_plugins:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            if self._ext_micro_step == 0:
                self._ext_begin_window(model)
            loss = super().training_step(model, inputs, num_items_in_batch)
            if self.accelerator.sync_gradients:
                self._ext_end_window(model)
            self._ext_micro_step += 1
        if self._ext_nonfinite != "ignore":
            self._ext_finite &= torch.isfinite(loss)
            self._ext_tally.add_step_loss(loss)
        return loss

    def _ext_begin_window(self, model: nn.Module) -> None:
        self._ext_before = self._ext_stream_gradients(model, "before")

    def _ext_end_window(self, model: nn.Module) -> None:
        streams = {**self._ext_before, **self._ext_stream_gradients(model, "after")}
        self._ext_before = {}
        if self.ext_plugins.implements("gradients_ready"):
            view = GradientView(self.ext_weights.names, self.ext_weights.parameters)
            self.ext_guard.run_all("gradients_ready", gradients=view, streams=streams)
        if any(stream.exhausted for stream in self.ext_streams.values()):
            self.control.should_training_stop = True

    def _ext_stream_gradients(self, model: nn.Module, when: str) -> dict[str, StreamGradient]:
        gradients = {}
        for role, stream in self.ext_streams.items():
            if stream.request.when == when:
                gradients[role] = stream_gradient(self, model, stream)
                self._ext_tally.add_stream(role, gradients[role].nll)
        return gradients

    def ext_per_token_loss(self, record: TokenRecord) -> Tensor:
        """(B, T) the objective's loss, 0 without a label: the owner's, or the negative log-probability."""
        owner = self.ext_plugins.owner("per_token_loss")
        if owner is None:
            return -record.log_probs
        ((_, call),) = self.ext_plugins.calls("per_token_loss")

        def checked(tokens: TokenRecord) -> Tensor:
            loss = call(tokens=tokens)
            if not isinstance(loss, Tensor) or loss.shape != tokens.log_probs.shape:
                got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise TypeError(f"returned {got}; expected a loss of shape {tuple(tokens.log_probs.shape)}")
            return loss

        loss = self.ext_guard.run("per_token_loss", owner, checked, -record.log_probs, tokens=record)
        # `where`, not a product: a loss may be infinite at masked positions, where the log-probability reads 0.
        return torch.where(record.mask, loss, torch.zeros_like(loss))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """After clipping, right before the optimiser: all ranks agree on failures and on finiteness."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._ext_skipped = False
        if self._ext_nonfinite == "ignore":
            if self.ext_plugins:
                self.ext_guard.agree()
            return norm
        value = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not self.ext_guard.agree_finite(value, self._ext_finite):
            if self._ext_nonfinite == "raise":
                raise self.ext_guard.non_finite()
            self._ext_skipped = True
            for parameter in model.parameters():
                parameter.grad = None  # optimisers leave parameters without a gradient, and their moments, alone
        self._ext_tally.end_step(self._ext_skipped)
        self._ext_finite.fill_(True)
        return norm

    # -- evaluation and saving ---------------------------------------------------------------------------------------

    def ext_deployed(self) -> dict[str, AbstractContextManager[None]]:
        """Contexts to evaluate under, by metric name; the first is the one to save under, its name is not shown."""
        if not hasattr(self, "ext_weights") or getattr(self, "_ext_swapped", False):
            return {"": nullcontext()}
        for plugin, call in self.ext_plugins.calls("deployed_weights"):
            contexts = self.ext_guard.run("deployed_weights", plugin, call, nullcontext(), weights=self.ext_weights)
            self.ext_guard.agree()
            return dict(contexts) if isinstance(contexts, Mapping) else {"": contexts}
        return {"": nullcontext()}

    @contextmanager
    def _ext_swap(self, context: AbstractContextManager[None]) -> Iterator[None]:
        before = getattr(self, "_ext_swapped", False)
        self._ext_swapped = True
        try:
            with context:
                yield
        finally:
            self._ext_swapped = before

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for i, (name, context) in enumerate(self.ext_deployed().items()):
            prefix = metric_key_prefix if i == 0 else f"{metric_key_prefix}_{name}"
            with self._ext_swap(context):
                metrics.update(super().evaluate(eval_dataset, ignore_keys, prefix))
        if self.ext_plugins:
            self.ext_guard.agree()
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if _internal_call:  # a checkpoint: raw weights, or resuming would be wrong
            super().save_model(output_dir, _internal_call=True)
            return
        with self._ext_swap(next(iter(self.ext_deployed().values()))):
            super().save_model(output_dir, _internal_call=False)

    # -- logging -----------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.ext_guard is not None and (self.ext_plugins or self._ext_nonfinite != "ignore"):
            mode = "train" if self.model.training else "eval"
            reduce = lambda t: self.accelerator.reduce(t, reduction="sum")  # noqa: E731
            self._ext_tally.write(logs, mode, reduce, self.accelerator.num_processes, bool(self.ext_plugins))
            if "train_runtime" not in logs:  # not the summary at the end, which belongs to no step
                prefix = "" if mode == "train" else "eval_"
                logs.update({prefix + k: v for k, v in self.ext_guard.metrics(mode).items()})
        super().log(logs, start_time)


class _StepCallback(TrainerCallback):
    """The moments that transformers offers only to callbacks."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if not trainer.ext_plugins.implements("weights_updated"):
            return
        skipped = trainer._ext_skipped or trainer.accelerator.optimizer_step_was_skipped
        trainer.ext_guard.run_all(
            "weights_updated", weights=trainer.ext_weights, step=state.global_step + 1, skipped=skipped
        )
        trainer.ext_guard.agree()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        every = args.rank_check_steps
        if every and trainer.accelerator.num_processes > 1 and state.global_step % every == 0:
            named = trainable_parameters(trainer.model)
            compare_ranks(named, trainer.ext_plugins, trainer.accelerator.device, state.global_step)


def _renamed(dataset: Any, columns: Mapping[str, str]) -> Any:
    if isinstance(dataset, Mapping):
        return {name: rename_columns(part, columns) for name, part in dataset.items()}
    return None if dataset is None else rename_columns(dataset, columns)


__all__ = ["ActivePlugin", "TrainerMixin"]
