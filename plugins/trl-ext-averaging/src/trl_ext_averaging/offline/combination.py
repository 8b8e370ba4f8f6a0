"""Where the tensors of an output come from: one interface for combinations of models and of adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from trl_ext.errors import CheckpointError
from trl_ext_averaging.offline.checkpoint import Checkpoint
from trl_ext_averaging.offline.rules import Rule

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

PIECE = 1 << 20
"""Elements read of each input at a time: 1 Mi, 8 MiB in the fp64 of the sum."""


class Source(Protocol):
    """The tensors of an output."""

    @property
    def layout(self) -> Layout:
        """Name to (dtype, shape), in the order in which they are written."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The output's config."""

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The flattened tensor, cut, in the layout's dtype."""


class Combination:
    """A linear combination of every tensor, summed in fp64 and rounded once.

    Memory: one piece in fp64 and one in the inputs' dtype, whatever the size and number of the inputs.

    Args:
        inputs: the checkpoints, compatible.
        names: the tensors to write.
        rule: coefficients for each tensor, or one list for all.
        template: the input whose config and dtypes the output has.
        dtype: dtype of all floating-point tensors of the output, in place of the template's.
    """

    def __init__(
        self,
        inputs: Sequence[Checkpoint],
        names: Sequence[str],
        rule: Rule | Sequence[float],
        template: Checkpoint,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._entries = {name: [checkpoint.entries[name] for checkpoint in inputs] for name in names}
        self._rule = rule
        self.config = dict(template.config)
        if dtype is not None and template.kind == "model":
            self.config["torch_dtype" if "torch_dtype" in self.config else "dtype"] = str(dtype).removeprefix("torch.")
        self.layout = {}
        for name in names:
            entry = template.entries[name]
            floating = entry.dtype.is_floating_point
            self.layout[name] = (dtype if dtype is not None and floating else entry.dtype, entry.shape)

    def pieces(self, name: str) -> Iterator[Tensor]:
        entries, (dtype, _) = self._entries[name], self.layout[name]
        starts = range(0, entries[0].numel, PIECE)
        if not dtype.is_floating_point:  # equal in all inputs
            yield from (entries[0].read(start, min(start + PIECE, entries[0].numel)) for start in starts)
            return
        coefficients = self._rule(entries) if callable(self._rule) else self._rule
        for start in starts:
            stop = min(start + PIECE, entries[0].numel)
            total = torch.zeros(stop - start, dtype=torch.float64)
            for coefficient, entry in zip(coefficients, entries, strict=True):
                if coefficient:
                    total.add_(entry.read(start, stop), alpha=coefficient)
            yield rounded(name, total, dtype)


def rounded(name: str, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Values of a tensor in the output's dtype.

    Raises:
        CheckpointError: a finite value is too large for it.
    """
    values = exact.to(dtype)
    if not torch.equal(values.isfinite(), exact.isfinite()):
        largest = float(exact[exact.isfinite()].abs().max())
        raise CheckpointError(f"{name} has a value of {largest:.3g}, too large for {dtype}; choose another --dtype")
    return values
