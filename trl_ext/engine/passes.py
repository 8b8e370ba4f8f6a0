"""Forward and backward passes that leave the trainer as it was: gradients, counters, metrics and random state.

Used for streams and for what `sample_weights` may compute. The model is called directly, with TRL's fused LM head, so
nothing of the trainer's bookkeeping is touched; `p.grad` is set aside and put back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from trl_ext.gradients import GradientView, local_tensor

if TYPE_CHECKING:
    from trl_ext.trainers.mixin import TrainerMixin


@contextmanager
def preserved_rng(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Put the CPU's and the device's random state back on exit; start from `seed` inside where one is given."""
    devices = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        if seed is not None:
            torch.manual_seed(seed)
        yield


@contextmanager
def swapped_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Give the block empty gradients, and put the old ones back on exit."""
    saved = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in zip(parameters, saved, strict=True):
            p.grad = grad


@contextmanager
def gradient_sync(model: nn.Module, syncing: bool) -> Iterator[None]:
    """Reduce gradients over ranks inside the block, also within the `no_sync` of an early micro-step.

    Args:
        model: the wrapped model.
        syncing: whether the surrounding micro-step reduces its gradients, which is put back on exit.
    """
    if isinstance(model, DistributedDataParallel):
        before = model.require_backward_grad_sync
        model.require_backward_grad_sync = True
        try:
            yield
        finally:
            model.require_backward_grad_sync = before
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(True)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(syncing)
    else:
        yield


@contextmanager
def standing_aside(trainer: TrainerMixin, seed: int | None = None) -> Iterator[None]:
    """All that an extra forward needs around it: TRL's autocast and offload contexts, a preserved random state."""
    with ExitStack() as stack:
        stack.enter_context(preserved_rng(trainer.accelerator.device, seed))
        offload = getattr(trainer, "maybe_activation_offload_context", None)
        if offload is not None:
            stack.enter_context(offload)
        stack.enter_context(trainer.compute_loss_context_manager())
        yield


def fused_forward(trainer: TrainerMixin, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """TRL's `FusedCausalLMOutput` of a batch, with the MoE balancing loss where the trainer uses it."""
    extra = {"output_router_logits": True} if trainer.aux_loss_enabled else {}
    return model(**{**inputs, "use_cache": False, **extra}, fused_lm_head=True)


def gradient_of(trainer: TrainerMixin, model: nn.Module, loss: Any, seed: int | None = None) -> GradientView:
    """The reduced gradient of a loss as a snapshot, with `p.grad` as before.

    Args:
        trainer: the trainer.
        model: the wrapped model; every rank must call this alike.
        loss: a function without arguments that runs the forward and returns the () loss of this rank.
        seed: seed of the pass (dropout); the surrounding random state is preserved in any case.
    """
    weights = trainer.ext_weights
    with swapped_gradients(weights.parameters):
        with gradient_sync(model, trainer.accelerator.sync_gradients):
            with standing_aside(trainer, seed):
                value: Tensor = loss()
            trainer.accelerator.backward(value)
        tensors = [None if p.grad is None else local_tensor(p.grad) for p in weights.parameters]
        return GradientView(weights.names, weights.parameters, tensors, trainer.ext_guard.agree)
