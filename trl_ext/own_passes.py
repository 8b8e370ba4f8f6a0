"""What a plugin's own passes through the model need, so that the training does not notice them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


def causal_lm(model: nn.Module) -> Any:
    """The model that carries TRL's fused head: the one inside of PEFT's wrapper, or the model itself without PEFT."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


@contextmanager
def inference_only(model: nn.Module) -> Iterator[None]:
    """A forward without gradient, dropout or gradient checkpointing, in a model that may be in the middle of a step."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def preserved_random_state(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """A block that leaves the random states of CPU and device as they were; inside they start from `seed` if given."""
    devices = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def drop_gathered_weights(model: nn.Module) -> None:
    """Let FSDP2 gather its weights anew: after a forward without backward it keeps the root's, which a change of the
    shards leaves behind. Nothing happens to a model that is not sharded so."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
