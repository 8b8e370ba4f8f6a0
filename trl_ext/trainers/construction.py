"""The mixin that opens a TRL trainer: its construction fills the engine's records, once, with what they need of TRL.

All overrides here and in the other files wrap methods of TRL and transformers; `trl_ext.seams` lists each of them.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from torch.distributed.tensor import DTensor

from trl_ext.engine.context import RunContext
from trl_ext.engine.guard import Guard
from trl_ext.engine.passes import ExtraPasses, sft_head
from trl_ext.engine.step import OptimizerStep
from trl_ext.engine.tally import LossTally
from trl_ext.engine.weight_swaps import WeightSwaps
from trl_ext.engine.zero import call_before_step, flat_shards, norm_of_partition
from trl_ext.gradients import trainable_parameters, unwrapped_name
from trl_ext.jobs import COSTS
from trl_ext.own_passes import causal_lm, drop_gathered_weights
from trl_ext.records import SetupContext, WeightsView
from trl_ext.startup.plan import RunPlan, check_loaded, plan_run
from trl_ext.startup.refusals import refuse_copied_groups, refuse_frozen, refuse_wrapped, why_not_skipping
from trl_ext.startup.report import report_run
from trl_ext.startup.run_folder import owned_run_folder
from trl_ext.startup.sharding import sharding_of_loaded
from trl_ext.startup.stream_data import TextForm, prepare_stream
from trl_ext.trainers.costs import CostCallback
from trl_ext.trainers.deployment import DeploymentMixin
from trl_ext.trainers.preemption import StopWhereAsked
from trl_ext.trainers.profiling import ProfileCallback
from trl_ext.trainers.saving import CheckpointMixin
from trl_ext.trainers.stepping import StepCallback, SteppingMixin
from trl_ext.trainers.tracking import trackers_of


class TrainerMixin(CheckpointMixin, DeploymentMixin, SteppingMixin):
    """Opens the hook points in a TRL trainer. Without plugins every override is a plain call to `super()`.

    Args:
        *args, **kwargs: those of the TRL trainer, under the same names.
        plugins: instances to activate after the plugins that `args.plugins` names.
        streams: role to auxiliary `datasets.Dataset`, in addition to those that `args.streams` names.

    Raises:
        ConfigurationError: for anything that cannot work, before the model loads wherever that can be known.
    """

    _ext_optimizer: torch.optim.Optimizer | None = None

    def __init__(
        self, *args: Any, plugins: list[Any] | None = None, streams: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        given = inspect.signature(super().__init__).bind_partial(*args, **kwargs).arguments
        plan = plan_run(self.ext_kind, self.ext_config_class, given, plugins or (), streams or {})
        self.ext_plugins, self.ext_columns = plan.plugins, plan.columns
        self.ext_reached = set(self.ext_called_from.values())
        super().__init__(**plan.arguments)
        check_loaded(plan, self.accelerator, self.model)
        self._ext_open(plan)

    # -- records for the engine --------------------------------------------------------------------------------------

    def _ext_open(self, plan: RunPlan) -> None:
        """Build what the overrides call; the trainers add what is theirs alone."""
        self.ext_run = self._ext_run_context(plan.fused_outputs)
        self.ext_passes = self._ext_extra_passes()
        chat_template, padding_free = getattr(self, "chat_template", None), getattr(self, "padding_free", False)
        streamed = plan.columns.streams
        tokenizer = getattr(self, "_tokenizer", self.processing_class)  # RewardTrainer takes nothing else
        form = TextForm(self.args, tokenizer, self.processing_class, chat_template, padding_free, streamed)
        self.ext_streams = {role: prepare_stream(form, *request) for role, request in plan.streams.items()}
        nonfinite = self.args.nonfinite or ("raise" if self.ext_plugins else "ignore")
        every = self.args.rank_check_steps
        self.ext_step = OptimizerStep(self.ext_run, self.ext_passes, self.ext_streams, nonfinite, every)
        sharding = sharding_of_loaded(self.accelerator, self.model)
        self.ext_step.skippable = why_not_skipping(self.args, sharding) is None
        self.ext_swaps = WeightSwaps(self.ext_run, lambda: self.ext_weights, self._ext_forget_weights)
        if self.ext_plugins or every:
            self.add_callback(StepCallback(self.ext_step, self.accelerator))
        if self.args.profile:
            self.add_callback(
                ProfileCallback(self.ext_run.guard, Path(self.args.output_dir), self.accelerator.process_index)
            )
        if self.ext_plugins and self.args.enable_jit_checkpoint:
            self.add_callback(StopWhereAsked(self.callback_handler.callbacks, self.ext_run.guard.agree))
        if costs := os.environ.get(COSTS):  # after what else may ask for a checkpoint
            self.add_callback(CostCallback(Path(costs), lambda: getattr(self, "_total_train_tokens", 0)))

    def _ext_run_context(self, fused_outputs: tuple[str, ...]) -> RunContext:
        device, world_size = self.accelerator.device, self.accelerator.num_processes
        return RunContext(
            plugins=self.ext_plugins,
            guard=Guard(self.ext_plugins, device, world_size, lambda: self.state.global_step),
            tally=LossTally(device),
            device=device,
            world_size=world_size,
            sum_over_ranks=partial(self.accelerator.reduce, reduction="sum"),
            training=lambda: self.model.training,
            step=lambda: self.state.global_step,
            progress=lambda: self.state.global_step / max(self.state.max_steps, 1),
            accumulation_steps=lambda: self.current_gradient_accumulation_steps,
            samples_marked=self._ext_samples_marked,
            fused_outputs=fused_outputs,
            columns=self.ext_columns.by_name,
        )

    def _ext_samples_marked(self) -> bool:
        """Whether the batches of the current mode show where a sample ends."""
        return True

    def _ext_extra_passes(self) -> ExtraPasses:
        return ExtraPasses(
            device=self.accelerator.device,
            weights=lambda: self.ext_weights,
            unwrapped=lambda: self.model,
            syncing=lambda: self.accelerator.sync_gradients,
            reducing=self._ext_reduces,
            surroundings=self._ext_surroundings,
            backward=self.accelerator.backward,
            agree=self.ext_run.guard.agree,
            to_device=lambda inputs: self._prepare_input(dict(inputs)),
            sft_head=self._ext_sft_head(),
            router_aux_loss_coef=self.router_aux_loss_coef if getattr(self, "aux_loss_enabled", False) else 0.0,
        )

    def _ext_reduces(self) -> bool:
        """Whether transformers lets the micro-step at hand reduce its gradients."""
        accumulation = self.accelerator.gradient_state
        return bool(self.accelerator.sync_gradients or accumulation.plugin_kwargs.get("sync_each_batch"))

    def _ext_sft_head(self) -> Callable[[], AbstractContextManager[None]]:
        """Gives contexts in which the model has a fused head that yields plain SFT log-probabilities."""
        cast = getattr(self.args, "cast_lm_head_to_fp32", False)
        return sft_head(self.ext_base_model, self.ext_run.fused_outputs, self.accelerator.autocast, cast)

    @contextmanager
    def _ext_surroundings(self) -> Iterator[None]:
        offload = getattr(self, "maybe_activation_offload_context", nullcontext())
        with offload, self.compute_loss_context_manager():
            yield

    def _ext_forget_weights(self) -> None:
        """Other weights are in place now: gather shards anew, and have them sent to vLLM again before it samples."""
        drop_gathered_weights(self.model)
        if hasattr(self, "_last_loaded_step"):
            self._last_loaded_step = -1

    def ext_base_model(self) -> nn.Module:
        """The model that carries a fused head."""
        return causal_lm(self.model)

    # -- training ----------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if not self.ext_plugins:
            return super().train(*args, **kwargs)
        with owned_run_folder(Path(self.args.output_dir), self.accelerator.is_main_process):
            return super().train(*args, **kwargs)

    # -- preparation -------------------------------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        # A second `train()` comes here again, with the optimiser already ours, perhaps inside accelerate's wrapper.
        ours = self._ext_optimizer is getattr(optimizer, "optimizer", optimizer)
        if self.ext_plugins.implements("wrap_optimizer") and not ours:

            def check(result: Any) -> None:
                if not isinstance(result, torch.optim.Optimizer):
                    raise TypeError(f"returned a {type(result).__name__} instead of a torch.optim.Optimizer")
                refuse_copied_groups(result)

            wrapped = self.ext_run.guard.chain("wrap_optimizer", "optimizer", optimizer, check)
            self.optimizer = self._ext_optimizer = wrapped
        return self.optimizer

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.is_deepspeed_enabled and (self.ext_plugins or self.ext_step.nonfinite != "ignore"):
            engine = self.deepspeed
            call_before_step(engine, lambda: self.ext_step.agree(engine, norm_of_partition(engine)))
        if self.ext_plugins:
            self._ext_setup(max_steps, resume_from_checkpoint)
            if self.accelerator.is_main_process:
                report_run(self.ext_kind, self.ext_plugins, self.ext_streams, Path(self.args.output_dir))
        return prepared

    def _ext_setup(self, max_steps: int, checkpoint: str | None) -> None:
        model = self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)
        named = trainable_parameters(model)
        refuse_frozen(named, is_peft_model(model))
        if self.ext_streams or self.ext_plugins.implements("sample_weights"):
            refuse_wrapped(self.model_wrapped)
        parameters = flat_shards(named.values())
        buffers = {unwrapped_name(name): buffer for name, buffer in model.named_buffers()}
        sharded = any(isinstance(p, DTensor) for p in parameters)
        weights = WeightsView(tuple(named), tuple(parameters), buffers, sharded)
        self.ext_weights = weights
        reference = getattr(self, "ref_model", None)
        context = SetupContext(
            trainer=self.ext_kind,
            model=model,
            weights=weights,
            names=weights.names,
            device=self.accelerator.device,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            sharded=sharded or any(isinstance(p, DTensor) for p in model.parameters()),  # as below an adapter
            gradient_accumulation_steps=self.args.gradient_accumulation_steps,
            max_steps=max_steps,
            output_dir=self.args.output_dir,
            resuming=checkpoint is not None,
            tokenizer=self.processing_class,
            reference=None if reference is None else self.accelerator.unwrap_model(reference),
            trackers=trackers_of(self.callback_handler.callbacks, self.is_world_process_zero(), self.ext_run.step),
        )
        self.ext_run.guard.run_all("setup", context=context)
        self.ext_run.guard.agree()
        if checkpoint is not None:
            self.ext_load_state(checkpoint)
