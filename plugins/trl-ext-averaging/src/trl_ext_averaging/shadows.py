"""The copies of the weights that an average is made of: how they are filled, updated, read, saved and loaded.

A copy is "wide", in fp32 or wider, where sums go into it: a bf16 average with d = 0.999 would not move. It is "exact",
in the dtype of the weights, where it only keeps them. All work is elementwise and in chunks, on the shards of this
rank, so that it is the same on one device, under DDP and under FSDP2. There copies are DTensors as the parameters are:
another number of ranks can take over what was saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from trl_ext.errors import CheckpointError
from trl_ext.gradients import copy_saved, local_tensor
from trl_ext_averaging.beside import Beside, lane_for

Copies = Mapping[str, list[Tensor]]
CopyKind = Literal["wide", "exact"]
Update = Callable[[Copies, list[Tensor]], None]
"""Changes copies in place, given the weights."""
Read = Callable[[Copies, list[Tensor]], Sequence[Tensor]]
"""Gives the weights to deploy from copies and weights, and changes neither."""

CHUNK, CHUNK_ON_HOST = 1 << 24, 1 << 20
"""Elements handled at a time: the fp32 scratch for low-precision weights stays at 64 MiB, and on CPU in the cache."""


class Shadows:
    """The copies of one average.

    Args:
        names: the averaged parameters.
        parameters: the parameters themselves, in the same order; DTensors where they are sharded.
        kinds: name to kind of each copy.
        on_host: keep the copies in host memory.
        beside: whether the copies are updated again after `begin`, and may be so beside the next step.
    """

    def __init__(
        self,
        names: Sequence[str] = (),
        parameters: Sequence[Tensor] = (),
        kinds: Mapping[str, CopyKind] | None = None,
        *,
        on_host: bool = False,
        beside: bool = False,
    ) -> None:
        self.names = tuple(names)
        weights = [parameter.detach() for parameter in parameters]
        self._saved = {copy: [_empty(w, kind, on_host) for w in weights] for copy, kind in (kinds or {}).items()}
        self.copies = {copy: [local_tensor(tensor) for tensor in tensors] for copy, tensors in self._saved.items()}
        """What is computed with: this rank's shards, in the memory of what is saved."""
        own = [tensor for tensors in self.copies.values() for tensor in tensors]
        self._on_host = on_host
        self._limit = CHUNK_ON_HOST if own and own[0].device.type == "cpu" else CHUNK
        lane = lane_for([local_tensor(weight) for weight in weights], own, on_host=on_host) if beside else None
        self._beside = None if lane is None else Beside(lane)

    @torch.no_grad()
    def begin(self, theta: list[Tensor]) -> None:
        """Let every copy start at these weights."""
        self.wait()
        for tensors in self.copies.values():
            for copy, tensor in zip(tensors, theta, strict=True):
                copy.copy_(tensor)

    def update(self, theta: list[Tensor], change: Update, done: Callable[[], None]) -> None:
        """Update the copies with these weights and call `done`: now, or beside the next step where there is a lane."""

        def run(theta: list[Tensor]) -> None:
            with torch.no_grad():
                for raw, *copies in chunks(theta, *self.copies.values(), limit=self._limit):
                    if self._on_host:
                        raw = [tensor.cpu() for tensor in raw]  # itself, where a lane has brought it there
                    change(dict(zip(self.copies, copies, strict=True)), widened(raw))
                done()

        if self._beside is None:
            run(theta)
        else:
            self._beside.submit(theta, run)

    @torch.no_grad()
    def write(self, into: list[Tensor], theta: list[Tensor], read: Read) -> None:
        """Write what `read` makes of the copies and of the weights `theta` into other tensors."""
        self.wait()
        for targets, raw, *copies in chunks(into, theta, *self.copies.values(), limit=self._limit):
            values = read(dict(zip(self.copies, copies, strict=True)), widened(raw))
            for target, value in zip(targets, values, strict=True):
                target.copy_(value)

    def wait(self) -> None:
        """Wait for updates that are under way, and raise what they raised."""
        if self._beside is not None:
            self._beside.wait()

    def close(self) -> None:
        """Finish, and update at once from here on."""
        beside, self._beside = self._beside, None
        if beside is not None:
            beside.close()

    def state_dict(self) -> dict[str, Tensor]:
        """The copies, under `<copy>/<parameter>`; DTensors where the parameters are."""
        self.wait()
        return {
            f"{copy}/{name}": tensor
            for copy, tensors in self._saved.items()
            for name, tensor in zip(self.names, tensors, strict=True)
        }

    def load_state_dict(self, state: Mapping[str, Any], method: str) -> None:
        """Take over saved copies.

        Raises:
            CheckpointError: a copy is missing or has another shape: the options or the model have changed.
        """
        for key, tensor in self.state_dict().items():
            saved = state.get(key)
            if saved is None or saved.shape != tensor.shape:
                copy, _, name = key.partition("/")
                found = "is missing" if saved is None else f"has shape {tuple(saved.shape)}"
                raise CheckpointError(
                    f"{method}: the saved copy {copy!r} of {name} {found}, expected {tuple(tensor.shape)}; resume with "
                    "the options that the checkpoint was written with"
                )
            copy_saved(tensor, saved)


def widened(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors in fp32 or wider: the same tensors where they already are, else a scratch copy."""
    if all(tensor.dtype in (torch.float32, torch.float64) for tensor in tensors):
        return tensors
    wide = [torch.empty_like(tensor, dtype=_wide(tensor.dtype)) for tensor in tensors]
    torch._foreach_copy_(wide, tensors)
    return wide


def chunks(*columns: Sequence[Tensor], limit: int) -> Iterator[list[list[Tensor]]]:
    """Cut parallel lists of tensors into groups of at most `limit` elements, as views.

    Args:
        columns: lists of N tensors; the i-th tensors of all lists have one shape.
        limit: elements of a group.

    Yields:
        one list of tensors per column, of equal shapes across columns. A row with a non-contiguous tensor is not cut.
    """
    group: list[tuple[Tensor, ...]] = []
    size = 0
    for row in zip(*columns, strict=True):
        contiguous = all(tensor.is_contiguous() for tensor in row)
        pieces = zip(*(tensor.view(-1).split(limit) for tensor in row), strict=True) if contiguous else [row]
        for piece in pieces:
            if group and size + piece[0].numel() > limit:
                yield [list(column) for column in zip(*group, strict=True)]
                group, size = [], 0
            group.append(piece)
            size += piece[0].numel()
    if group:
        yield [list(column) for column in zip(*group, strict=True)]


def _empty(weight: Tensor, kind: CopyKind, on_host: bool) -> Tensor:
    dtype = _wide(weight.dtype) if kind == "wide" else None
    return torch.empty_like(weight, dtype=dtype, device="cpu" if on_host else None)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
