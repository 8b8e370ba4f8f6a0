"""Do all ranks still hold the same? Compares bit patterns of what should be replicated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trl_ext.errors import PluginError

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bit_sum(tensor: Tensor) -> Tensor:
    """() int64: the sum of a tensor's words read as integers; equal for equal bits, computed on its device."""
    words = tensor.detach().contiguous().view(-1).view(_WORDS[tensor.element_size()])
    return words.sum(dtype=torch.int64)


def compare_ranks(
    parameters: Mapping[str, nn.Parameter], plugins: Iterable[Any], device: torch.device, step: int
) -> None:
    """Raise on every rank if a replicated parameter or plugin tensor differs between ranks. Collective.

    Shards (DTensors, plugins with `state_per_rank`) are left out: they differ by design.

    Raises:
        PluginError: naming the first tensor that differs, and the ranks.
    """
    tensors: dict[str, Tensor] = {name: p for name, p in parameters.items() if not isinstance(p, DTensor)}
    for plugin in plugins:
        if hasattr(plugin.instance, "state_dict") and not getattr(plugin.instance, "state_per_rank", False):
            state = plugin.instance.state_dict()
            tensors.update({f"{plugin.name}: {k}": v for k, v in state.items() if isinstance(v, Tensor)})
    if not tensors:
        return
    sums = torch.stack([bit_sum(t).to(device) for t in tensors.values()])
    gathered = [torch.empty_like(sums) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, sums)
    for rank, other in enumerate(gathered):
        differing = (other != gathered[0]).nonzero()
        if len(differing):
            name = list(tensors)[int(differing[0])]
            raise PluginError(
                f"ranks 0 and {rank} hold different values of '{name}' after step {step}, "
                f"{len(differing)} of {len(tensors)} tensors differ; a hook has acted on rank-local data"
            )
