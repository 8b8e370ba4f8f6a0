"""Forward and backward passes that leave the trainer as it was: gradients, counters, metrics and random state.

Used for streams and for what `sample_weights` may compute. The model is called directly, with TRL's fused LM head, so
nothing of the trainer's bookkeeping is touched; `p.grad` is set aside and put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.state import GradientState
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from trl_ext.engine.columns import without_columns
from trl_ext.engine.fused_head import add_head
from trl_ext.gradients import GradientView, local_tensor
from trl_ext.own_passes import preserved_random_state
from trl_ext.records import WeightsView


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
def gradient_sync(model: nn.Module, reducing: bool) -> Iterator[None]:
    """Reduce gradients over ranks inside the block, also within the `no_sync` of an early micro-step.

    Args:
        model: the wrapped model.
        reducing: whether the surrounding micro-step reduces its gradients, which is put back on exit.
    """
    reducer = reducer_of(model)
    if isinstance(reducer, DistributedDataParallel):
        before = reducer.require_backward_grad_sync
        reducer.require_backward_grad_sync = True
        try:
            yield
        finally:
            reducer.require_backward_grad_sync = before
    elif isinstance(reducer, FSDPModule):
        reducer.set_requires_gradient_sync(True)
        # By this transformers decides whether to average what FSDP2 does not manage, such as an adapter on shards.
        accumulation = GradientState()
        last, accumulation.sync_gradients = accumulation.sync_gradients, True
        try:
            yield
        finally:
            accumulation.sync_gradients = last
            if _replicates(model):
                reducer.set_requires_all_reduce(reducing)
            else:
                reducer.set_requires_gradient_sync(reducing)
    else:
        yield


def reducer_of(model: nn.Module) -> DistributedDataParallel | FSDPModule | None:
    """What sums the gradients over ranks: the outermost DDP or FSDP2 module, inside of torch.compile's and PEFT's
    wrappers too; None on one rank."""
    kinds = (DistributedDataParallel, FSDPModule)
    return next((module for module in model.modules() if isinstance(module, kinds)), None)


def _replicates(model: nn.Module) -> bool:
    """Whether transformers has sharded the model for several replicas (HSDP), between which alone it defers sums."""
    distributed = getattr(getattr(model, "config", None), "distributed_config", None)
    return distributed is not None and distributed.dp_replicate_size > 1


@dataclass(frozen=True)
class ExtraPasses:
    """How to run the model outside of TRL's step. What changes during a run is a function."""

    device: torch.device
    weights: Callable[[], WeightsView]
    """Gives the trainable parameters, once the model is prepared."""
    unwrapped: Callable[[], nn.Module]
    """The model without DDP around it, whose passes reduce nothing."""
    syncing: Callable[[], bool]
    """Whether the micro-step at hand is the last of its window."""
    reducing: Callable[[], bool]
    """Whether the micro-step around the pass reduces its gradients over ranks."""
    surroundings: Callable[[], AbstractContextManager[None]]
    """What TRL runs a forward in: mixed precision, and offloading of activations where it is on."""
    backward: Callable[[Tensor], None]
    agree: Callable[[], object]
    """Called before the collectives of a gradient view, so that a rank whose hook has failed is not waited for."""
    to_device: Callable[[Mapping[str, Any]], dict[str, Any]]
    sft_head: Callable[[], AbstractContextManager[None]] = nullcontext
    """Gives a context in which the fused head yields plain SFT log-probabilities."""
    router_aux_loss_coef: float = 0.0
    """Weight of the MoE balancing loss; 0 where it is off."""

    @contextmanager
    def aside(self, seed: int | None = None) -> Iterator[None]:
        """All that an extra forward needs around it: TRL's contexts, and a random state that is put back."""
        with preserved_random_state(self.device, seed), self.surroundings():
            yield

    def forward(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """TRL's `FusedCausalLMOutput` of a batch, with the MoE balancing loss where the run uses it."""
        extra = {"output_router_logits": True} if self.router_aux_loss_coef else {}
        return model(**{**without_columns(inputs), "use_cache": False, **extra}, fused_lm_head=True)

    def gradient(self, model: nn.Module, loss: Callable[[], Tensor], seed: int | None = None) -> GradientView:
        """The reduced gradient of a loss as a snapshot, with `p.grad` as before.

        Args:
            model: the wrapped model; every rank must call this alike.
            loss: runs the forward and returns the () loss of this rank.
            seed: seed of the pass (dropout); the surrounding random state is preserved in any case.
        """
        weights = self.weights()
        with swapped_gradients(weights.parameters):
            with gradient_sync(model, self.reducing()):
                with self.aside(seed):
                    value = loss()
                self.backward(value)
            tensors = [None if p.grad is None else local_tensor(p.grad) for p in weights.parameters]
            return GradientView(weights.names, weights.parameters, tensors, self.agree)


def sft_head(
    base_model: Callable[[], nn.Module],
    outputs: Sequence[str],
    autocast: Callable[[], AbstractContextManager[Any]],
    cast_to_fp32: bool,
) -> Callable[[], AbstractContextManager[None]]:
    """Give contexts in which the fused head of a GRPO model yields SFT log-probabilities, and the named outputs too.

    GRPO's head divides logits by the sampling temperature; SFT data wants them as they are. The heads are exchanged
    beneath the mixed precision that accelerate has put around the model's forward, so it is put around this one too.
    """
    forward: Any = None

    @contextmanager
    def exchanged() -> Iterator[None]:
        nonlocal forward
        base = base_model()
        policy_forward = base.forward
        if forward is None:
            add_head(base, ("log_probs", "entropy", *outputs), cast_to_fp32)
            forward = base.forward
        base.forward = forward
        try:
            with autocast():
                yield
        finally:
            base.forward = policy_forward

    return exchanged
