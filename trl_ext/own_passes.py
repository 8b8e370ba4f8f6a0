"""What a plugin's own passes through the model need, so that the training does not notice them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

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
    """Drop the whole parameters that are kept beside the shards, after the shards have been changed. Not collective.

    FSDP2 keeps those of its root after a forward without backward, ZeRO-3 small ones always: without this the model
    would go on with the values from before. The next forward gathers them again.

    Args:
        model: the unwrapped model.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    gathered: list[Any] = [p for p in model.parameters() if hasattr(p, "ds_status") and p.ds_status.name == "AVAILABLE"]
    if gathered:
        gathered[0].partition(gathered)


class Reader(Protocol):
    """Reads the weights beside the training: on a stream of its own, or in a thread."""

    def weights_read(self) -> None:
        """Let what the training does next wait until the weights have been read."""


_READERS: weakref.WeakSet[Reader] = weakref.WeakSet()


def read_beside(reader: Reader) -> None:
    """Have `reader.weights_read` called before the hooks of plugins, any of which may write to the weights.

    For its own updates an optimiser has a hook of torch's (`register_optimizer_step_pre_hook`).

    Args:
        reader: held weakly, and asked for as long as it lives.
    """
    _READERS.add(reader)


def wait_for_readers() -> None:
    """Let what comes next wait until nobody reads the weights beside it any more. Plugins need not call it."""
    for reader in tuple(_READERS):
        reader.weights_read()
