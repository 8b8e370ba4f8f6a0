"""Records are read: what a hook edits in place of them is found by the version counters that PyTorch keeps of tensors.

The core, the log and other plugins read the same tensors, so that an edit of a mask or of log-probabilities would
change numbers far from the plugin. Not found: what goes around the counters, as `tensor.data` and NumPy do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from trl_ext.gradients import GradientView
from trl_ext.records import MicroStep, PolicyTokens, Rewards, Rollouts, TokenRecord, Window

READ_ONLY = (MicroStep, PolicyTokens, Rewards, Rollouts, TokenRecord, Window)


class Unmodified:
    """The tensors of the records that a hook is called with, as they were before the call.

    Args:
        arguments: The hook's, by name. Some are there to be edited: the window's gradients, and weights.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        records = {
            name: value for name, value in arguments.items() if isinstance(value, READ_ONLY) or name == "streams"
        }
        self._before = [(path, tensor, tensor._version) for path, tensor in _tensors("", records)]

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


def _tensors(path: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a record, a mapping or a sequence, each with where it stands."""
    if isinstance(value, Tensor):
        if not value.is_inference():  # such tensors have no version
            yield path, value
    elif isinstance(value, GradientView):
        yield from _tensors(path, value.tensors)
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from _tensors(f"{path}.{name}" if path else str(name), part)
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            yield from _tensors(f"{path}[{i}]", part)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(f"{path}.{field.name}", getattr(value, field.name))
