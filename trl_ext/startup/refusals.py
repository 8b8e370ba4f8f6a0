"""What cannot be supported is refused at start-up, with the reason and the line to change."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trl_ext.engine.fused_head import OFFERED, is_offered
from trl_ext.engine.passes import reducer_of
from trl_ext.errors import ConfigurationError
from trl_ext.hookspecs import HOOKS
from trl_ext.plugins.plugin_set import PluginSet
from trl_ext.records import RunDescription
from trl_ext.records.tokens import UNMARKED
from trl_ext.startup.sharding import Sharding, offloads, refuse_dimensions


def refuse_unsupported(
    run: RunDescription, plugins: PluginSet, compute_loss_func: Any = None, streaming: bool = False
) -> None:
    """Raise for every combination that would train something else than what was asked for.

    Args:
        run: the run.
        plugins: the active plugins.
        compute_loss_func: what the trainer was given under this name.
        streaming: whether the training set can only be iterated.

    Raises:
        ConfigurationError: with the hook's owner and the setting to change.
    """
    args = run.args
    if "unsloth" in sys.modules:
        raise ConfigurationError("unsloth rewrites TRL's trainers from source; trl_ext's seams do not hold there")
    if args.n_gpu > 1:
        raise ConfigurationError(
            f"nn.DataParallel over {args.n_gpu} GPUs is not supported: launch with `torchrun` or `accelerate launch`, "
            "or set CUDA_VISIBLE_DEVICES to one GPU"
        )
    if args.auto_find_batch_size:
        raise ConfigurationError(
            "auto_find_batch_size=True restarts the training loop under the plugins' feet; set the batch size yourself"
        )
    refuse_dimensions(args, run.model)
    if run.trainer == "sft":
        _refuse_losses(args, plugins, compute_loss_func)
    if run.trainer == "grpo":
        _refuse_policy(args, plugins)
    if run.trainer in HOOKS["prompt_order"].trainers:
        _refuse_orders(args, plugins, streaming)
    _refuse_gradients(run, plugins)
    for plugin in plugins:
        unknown = [name for name in plugin.declared.fused_outputs if not is_offered(name)]
        if unknown:
            raise ConfigurationError(
                f"plugin {plugin} declares fused_outputs {unknown}; "
                f"the head offers {OFFERED} beside log_probs and entropy"
            )


def _refuse_losses(args: Any, plugins: PluginSet, compute_loss_func: Any) -> None:
    owner = plugins.owner("per_token_loss")
    touching = owner or plugins.owner("sample_weights")
    if owner is not None and args.loss_type != "nll":
        raise ConfigurationError(
            f"plugin '{owner}' owns the per-token loss, but loss_type='{args.loss_type}' asks TRL for another one; "
            "set loss_type='nll' or remove the plugin"
        )
    weighing = plugins.owner("sample_weights")
    if weighing is not None and args.packing and args.packing_strategy == "wrapped":
        raise ConfigurationError(f"plugin '{weighing}' weighs samples, but {UNMARKED}")
    if touching is not None and compute_loss_func is not None:
        raise ConfigurationError(f"compute_loss_func bypasses plugin '{touching}'; pass only one of the two")
    if touching is not None and args.label_smoothing_factor > 0:
        raise ConfigurationError(
            f"label_smoothing_factor={args.label_smoothing_factor} bypasses plugin '{touching}'; set it to 0"
        )


def _refuse_policy(args: Any, plugins: PluginSet) -> None:
    owner = plugins.owner("policy_loss")
    if owner is None:
        return
    if args.off_policy_mask_threshold is not None:
        raise ConfigurationError(
            f"off_policy_mask_threshold masks TRL's own policy term, which plugin '{owner}' replaces; unset it"
        )
    if getattr(args, "use_adaptive_entropy", False):
        raise ConfigurationError(
            f"use_adaptive_entropy=True updates its controller with every loss, and plugin '{owner}' evaluates TRL's "
            "loss twice a step; use a constant entropy_coef"
        )
    if args.loss_type == "cispo" and args.epsilon_high is not None and args.epsilon_high < 1:
        raise ConfigurationError(
            f"loss_type='cispo' with epsilon_high={args.epsilon_high} < 1 scales tokens on policy, so the weights of "
            f"plugin '{owner}' would be scaled too; set epsilon_high >= 1"
        )


def _refuse_orders(args: Any, plugins: PluginSet, streaming: bool) -> None:
    if not plugins.implements("prompt_order"):
        return
    where = f"plugin '{plugins.calls('prompt_order')[0][0]}' orders the training prompts"
    if streaming:
        raise ConfigurationError(f"{where}, which a streaming data set does not allow; load it with streaming=False")
    if args.accelerator_config.dispatch_batches:
        raise ConfigurationError(
            f"{where} on all ranks; accelerator_config's dispatch_batches=True draws them on rank 0 alone, remove it"
        )


def _refuse_gradients(run: RunDescription, plugins: PluginSet) -> None:
    uses = [h for h in ("gradients_ready", "sample_weights", "streams", "wrap_optimizer") if plugins.implements(h)]
    offloaded = run.sharding == "fsdp2" and offloads(run.args, run.model)
    if run.sharding == "fsdp1" or offloaded:
        uses += [h for h in ("weights_updated", "deployed_weights", "sampling_weights") if plugins.implements(h)]
    if not uses:
        return
    owner = plugins.calls(uses[0])[0][0]
    where = f"hook '{uses[0]}' of plugin '{owner}'"
    if run.sharding == "deepspeed":
        raise ConfigurationError(
            f"{where} does not work under DeepSpeed, whose ZeRO keeps gradients in buffers of its own and steps inside "
            "of the backward pass; use FSDP2, which shards as ZeRO-3 does, or DDP"
        )
    if run.sharding == "fsdp1":
        raise ConfigurationError(f"{where} does not work under FSDP1's flat parameters; set fsdp_version: 2")
    if offloaded:
        raise ConfigurationError(
            f"{where} has not been tried with parameters that FSDP2 keeps in host memory, beside activations on the "
            "GPU; set cpu_offload of fsdp_config (accelerate: fsdp_offload_params, DistributedConfig: "
            "fsdp_cpu_offload) to False. On more ranks each holds less, and averages have device=cpu of their own"
        )
    if run.args.mixed_precision == "fp16":  # of the config or the launcher
        raise ConfigurationError(f"{where} would see gradients scaled for fp16; set bf16=True and fp16=False")


def refuse_skipping(args: Any, sharding: Sharding) -> None:
    """`nonfinite="skip"` where a step cannot be left out by taking its gradients away right before the optimiser.

    Raises:
        ConfigurationError: naming what steps on all the same, and the setting to change.
    """
    why = why_not_skipping(args, sharding)
    if args.nonfinite == "skip" and why is not None:
        raise ConfigurationError(f"nonfinite='skip' cannot leave out a step, since {why}, or set nonfinite='raise'")


def why_not_skipping(args: Any, sharding: Sharding) -> str | None:
    """What steps on all the same, and the setting to change; None where a step can be left out."""
    optim = getattr(args.optim, "value", args.optim)
    if sharding == "deepspeed":
        return "DeepSpeed steps inside of its backward pass; use DDP or FSDP2"
    if optim.endswith(("layerwise", "lomo")):
        return f"optim='{optim}' updates the weights inside of the backward pass; choose another one"
    if optim.startswith("schedule_free"):
        return f"optim='{optim}' moves the weights of its average on without a gradient too; choose another one"
    return None


def refuse_frozen(parameters: Collection[str], peft: bool) -> None:
    """A run that trains nothing; its logs look healthy where checkpointing of activations gives the loss a gradient.

    Args:
        parameters: names of those that train.
        peft: whether the model is under PEFT.

    Raises:
        ConfigurationError: there are none.
    """
    if not parameters:
        change = "load the adapter with is_trainable=True" if peft else "set requires_grad on those to train"
        raise ConfigurationError(
            f"no parameter of the model is trainable, so that the run would change nothing; {change}"
        )


def refuse_copied_groups(optimizer: torch.optim.Optimizer) -> None:
    """An optimiser around another one that has groups of its own: schedules and FSDP2 change those of the outer one.

    Raises:
        ValueError: with the line to write.
    """
    inner = [value for value in vars(optimizer).values() if isinstance(value, torch.optim.Optimizer)]
    shared = {id(group) for group in optimizer.param_groups}
    if inner and not any(id(group) in shared for other in inner for group in other.param_groups):
        raise ValueError(
            f"returned a {type(optimizer).__name__} around a {type(inner[0]).__name__}, with copies of its "
            "param_groups, so that the inner one would never see the learning rate's schedule; write "
            "self.param_groups = optimizer.param_groups"
        )


def refuse_wrapped(wrapped: nn.Module) -> None:
    """What only the prepared model shows, of runs that swap gradients: those with streams or sample weights.

    Args:
        wrapped: the model as accelerate has wrapped it.

    Raises:
        ConfigurationError: with the setting to change.
    """
    reducer = reducer_of(wrapped)
    if isinstance(reducer, DistributedDataParallel) and reducer.gradient_as_bucket_view:
        raise ConfigurationError(
            "streams and sample weights swap gradients, which DDP's gradient_as_bucket_view=True corrupts; set it to "
            "False"
        )
