"""Do all ranks still hold the same? Compares bit patterns of what should be replicated."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trl_ext.checkpoints.files import Gather
from trl_ext.engine.guard import Guard
from trl_ext.errors import PluginError
from trl_ext.gradients import local_tensor

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


@dataclass(frozen=True)
class Fingerprint:
    """What a rank holds under one name. Ranks at the same place have to hold the same."""

    place: tuple[int, ...]
    """Which shard it is, by its coordinate in each mesh dimension that shards it; () for what is replicated."""
    form: str
    """Dtype and shape, or "value"."""
    bits: int

    def __str__(self) -> str:
        return f"{self.form} with the hash {self.bits & 0xFFFFFFFF:08x}"


def bit_sum(tensor: Tensor) -> Tensor:
    """() int64: the sum of a tensor's words read as integers; equal for equal bits, computed on its device."""
    words = tensor.detach().contiguous().view(-1).view(_WORDS[tensor.element_size()])
    return words.sum(dtype=torch.int64)


def replicated_states(guard: Guard) -> dict[str, dict[str, Any]]:
    """The state of each plugin that keeps one, but for those that declare it different on each rank. Collective."""
    states: dict[str, dict[str, Any]] = {}
    for plugin in guard.plugins:
        if hasattr(plugin.instance, "state_dict") and not getattr(plugin.instance, "state_per_rank", False):
            give = plugin.instance.state_dict
            states[plugin.name] = guard.run("state_dict", plugin.name, give, {}, _is_dictionary)
    guard.agree()
    return states


def _is_dictionary(state: Any) -> None:
    if not isinstance(state, Mapping):
        raise TypeError(f"returned a {type(state).__name__} instead of a dictionary")


def compare_ranks(
    parameters: Mapping[str, nn.Parameter], states: Mapping[str, Mapping[str, Any]], gather: Gather, step: int
) -> list[str]:
    """Raise on every rank if what should be replicated differs between ranks. Collective.

    A shard is compared with its replicas, where the mesh has any. The names come with the hashes, so that ranks which
    hold other things are told so.

    Args:
        parameters: those of this rank.
        states: plugin to its state, tensors and JSON values, for plugins whose state is replicated.
        gather: gives every rank's object, on every rank.
        step: optimiser steps done, for the message.

    Returns:
        The names of the parameters whose shards no other rank holds, so that there was nothing to compare them with.

    Raises:
        PluginError: naming the first thing that differs, and the ranks.
    """
    mine = _fingerprints({**parameters, **{f"{name}: {k}": v for name, s in states.items() for k, v in s.items()}})
    ranks: list[dict[str, Fingerprint]] = gather(mine)
    names = list(dict.fromkeys(name for held in ranks for name in held))
    differing = [(name, pair) for name in names if (pair := _first_pair([held.get(name) for held in ranks]))]
    if differing:
        name, (a, b) = differing[0]
        raise PluginError(
            f"ranks {a} and {b} hold different values of '{name}' after step {step}: "
            f"{ranks[a].get(name, 'nothing')} and {ranks[b].get(name, 'nothing')}; "
            f"{len(differing)} of {len(names)} differ; a hook has acted on rank-local data"
        )
    return [name for name in parameters if sum(_same_place(rank.get(name), mine[name]) for rank in ranks) == 1]


def _fingerprints(held: Mapping[str, Any]) -> dict[str, Fingerprint]:
    tensors = {name: value for name, value in held.items() if isinstance(value, Tensor)}
    sums = _to_numbers([bit_sum(local_tensor(tensor)) for tensor in tensors.values()])
    found = {
        name: Fingerprint(_place(tensor), f"{tensor.dtype} {tuple(tensor.shape)}", bits)
        for (name, tensor), bits in zip(tensors.items(), sums, strict=True)
    }
    for name, value in held.items():
        if name not in tensors:
            digest = hashlib.sha256(json.dumps(value, sort_keys=True, default=repr).encode()).digest()
            found[name] = Fingerprint((), "value", int.from_bytes(digest[:8]))
    return found


def _to_numbers(sums: Iterable[Tensor]) -> list[int]:
    """One transfer a device."""
    by_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for i, value in enumerate(sums):
        by_device.setdefault(value.device, []).append((i, value))
    numbers: dict[int, int] = {}
    for pairs in by_device.values():
        numbers.update(zip([i for i, _ in pairs], torch.stack([value for _, value in pairs]).tolist(), strict=True))
    return [numbers[i] for i in range(len(numbers))]


def _place(tensor: Tensor) -> tuple[int, ...]:
    if not isinstance(tensor, DTensor):
        return ()
    coordinate = tensor.device_mesh.get_coordinate() or [0] * tensor.device_mesh.ndim
    return tuple(coordinate[d] for d, placement in enumerate(tensor.placements) if not placement.is_replicate())


def _same_place(one: Fingerprint | None, other: Fingerprint) -> bool:
    return one is not None and one.place == other.place


def _first_pair(held: list[Fingerprint | None]) -> tuple[int, int] | None:
    """The first two ranks that should hold the same and do not."""
    first: dict[tuple[int, ...], int] = {}
    for rank, mine in enumerate(held):
        if mine is None or held[0] is None:
            if (mine is None) != (held[0] is None):
                return 0, rank
            continue
        before = first.setdefault(mine.place, rank)
        if held[before] != mine:
            return before, rank
    return None
