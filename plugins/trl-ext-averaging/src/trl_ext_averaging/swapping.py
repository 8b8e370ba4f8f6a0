"""Other weights in the model for a while, and afterwards, whatever happens, the raw ones bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trl_ext.gradients import forget_gathered


class Swapper:
    """Swaps weights of a model in place.

    Args:
        model: the model; where its weights are shards, those gathered from them are dropped at a swap.
        in_host_memory: compute the other weights from the copy of the raw ones in host memory.
    """

    def __init__(self, model: nn.Module, in_host_memory: bool = False) -> None:
        self._model = model
        self._in_host_memory = in_host_memory

    @contextmanager
    def swapped(self, theta: list[Tensor], write: Callable[[list[Tensor], list[Tensor]], None]) -> Iterator[None]:
        """A context with other weights in the model.

        Args:
            theta: the weights in the model.
            write: called with these and with the raw weights to compute from; it writes the others into the former.
        """
        raw = [tensor.to("cpu", copy=True) for tensor in theta]  # host memory: a swap costs none on the device
        try:
            write(theta, raw if self._in_host_memory else theta)
            forget_gathered(self._model)
            yield
        finally:
            with torch.no_grad():
                for tensor, saved in zip(theta, raw, strict=True):
                    tensor.copy_(saved)
            forget_gathered(self._model)
