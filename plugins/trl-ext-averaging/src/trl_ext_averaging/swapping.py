"""Other weights in the model for a while, and afterwards, whatever happens, the raw ones bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def swapped(
    theta: list[Tensor], write: Callable[[list[Tensor], list[Tensor]], None], *, in_host_memory: bool = False
) -> Iterator[None]:
    """A context with other weights in the model.

    Args:
        theta: the weights in the model; shards where each rank holds some.
        write: called with these and with the raw weights to compute from; it writes the others into the former.
        in_host_memory: compute the other weights from the copy of the raw ones in host memory.
    """
    raw = [tensor.to("cpu", copy=True) for tensor in theta]  # host memory: a swap costs none on the device
    try:
        write(theta, raw if in_host_memory else theta)
        yield
    finally:
        with torch.no_grad():
            for tensor, saved in zip(theta, raw, strict=True):
                tensor.copy_(saved)
