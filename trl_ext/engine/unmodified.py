"""Records are read: what a hook edits in place of them is found by the version counters that PyTorch keeps of tensors.

The core, the log and other plugins read the same tensors, so that an edit of a mask or of log-probabilities would
change numbers far from the plugin. Not found: what goes around the counters, as `tensor.data` and NumPy do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from trl_ext.records import MicroStep, PolicyTokens, Rewards, Rollouts, TokenRecord, Window

READ_ONLY = (MicroStep, PolicyTokens, Rewards, Rollouts, TokenRecord, Window)


class Unmodified:
    """The tensors of the records that a hook is called with, as they were before the call.

    Args:
        arguments: The hook's, by name. Weights and gradients are there to be edited, those of streams too.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._before = [
            (path, tensor, tensor._version)
            for path, tensor in tensors_of_records(arguments)
            if not tensor.is_inference()  # such tensors have no version
        ]

    def check(self) -> None:
        """Hold the tensors against what they were.

        Raises:
            ValueError: one was edited in place.
        """
        for path, tensor, version in self._before:
            if tensor._version != version:
                raise ValueError(
                    f"edited {path} in place, which the core and other plugins read too; edit a clone of it"
                )


def tensors_of_records(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of all records among a hook's arguments, each with where it stands: `tokens.mask`."""
    for name, record in arguments.items():
        if isinstance(record, READ_ONLY):
            for field, value in vars(record).items():
                yield from _tensors(f"{name}.{field}", value)


def _tensors(path: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a field of a record, be it one, a mapping or a sequence of them; each with where it stands."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        yield from ((f"{path}.{name}", part) for name, part in value.items() if isinstance(part, Tensor))
    elif isinstance(value, list | tuple) and value and isinstance(value[0], Tensor | Mapping):
        for i, part in enumerate(value):
            yield from _tensors(f"{path}[{i}]", part)
