"""DeepSpeed's ZeRO as the rest of the core sees it: when its engine steps, its gradients, and its weights as shards.

accelerate's backward pass ends in the engine's `step` at the last micro-step of a window, so the ranks agree between
the two. Nothing of DeepSpeed is imported; what is read of its objects stands in `trl_ext.seams`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from trl_ext.errors import ConfigurationError


def call_before_step(engine: Any, before: Callable[[], object]) -> None:
    """Call something whenever the engine is about to clip the reduced gradients and to step.

    Args:
        engine: DeepSpeed's, as accelerate has wrapped the model in it.
        before: called on every rank alike; what it raises keeps the engine from stepping.
    """
    step = engine.step

    @wraps(step)
    def agreed_step(*args: Any, **kwargs: Any) -> Any:
        before()
        return step(*args, **kwargs)

    engine.step = agreed_step


def norm_of_partition(engine: Any) -> Tensor:
    """() float: the norm of this rank's part of the reduced gradients, before clipping.

    In fp16 it is 0: infinite gradients are the loss scaler's own business, which leaves the step out.

    Raises:
        ConfigurationError: an optimiser of DeepSpeed's that keeps its gradients elsewhere.
    """
    zero = torch.zeros((), device=engine.device)
    if engine.fp16_enabled():
        return zero
    kept = getattr(engine.optimizer, "averaged_gradients", None)
    if kept is None:
        raise ConfigurationError(
            f"the gradients that DeepSpeed's {type(engine.optimizer).__name__} keeps cannot be looked at for NaN and "
            "infinity; set zero_optimization.stage to 2 or 3, or nonfinite='ignore'"
        )
    gradients = [gradient for group in kept.values() for gradient in group or ()]
    if not gradients:  # the optimiser is offloaded, and has taken them
        parts = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")  # of ZeRO-1 and 2, and of ZeRO-3
        flat = next(getattr(engine.optimizer, name) for name in parts if hasattr(engine.optimizer, name))
        gradients = [part.grad for part in flat if part.grad is not None]
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32) if gradients else ()
    return torch.stack([zero, *(norm.to(zero.device) for norm in norms)]).norm()


def flat_shards(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Parameters under ZeRO-3 as flat DTensors, sharded over all ranks; others as they are.

    ZeRO-3 cuts a parameter of n elements, flattened, into one part of ceil(n / ranks) elements a rank, the last of them
    shorter. The DTensors share the memory that ZeRO-3 gathers from, so that what is written there is in the model's
    next forward, once `trl_ext.own_passes.drop_gathered_weights` has dropped what was gathered before.

    Args:
        parameters: of any shape, in the model's dtype; the fp32 weights of the optimiser are others.

    Returns:
        As many parameters, of shape (n,).
    """
    flat = list(parameters)
    devices = {p.ds_tensor.device.type for p in flat if hasattr(p, "ds_tensor")}
    meshes = {device: init_device_mesh(device, (dist.get_world_size(),)) for device in devices}
    return [_flat_shard(p, meshes) if hasattr(p, "ds_tensor") else p for p in flat]


def _flat_shard(parameter: nn.Parameter, meshes: Mapping[str, DeviceMesh]) -> nn.Parameter:
    part, size = parameter.ds_tensor.data, parameter.ds_numel  # type: ignore[attr-defined]
    mesh = meshes[part.device.type]
    own = part[: max(0, min(part.numel(), size - dist.get_rank() * part.numel()))]  # the rest is padding
    whole = DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=torch.Size([size]), stride=(1,))
    return nn.Parameter(whole, requires_grad=parameter.requires_grad)
