"""What ranks exchange in one optimiser step: every collective that torch dispatches, with its bytes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

GRADIENTS = 1 << 10
"""Bytes from which an exchange is one of gradients or weights; below are counts, flags and inner products."""
_NOT_ONE = ("wait", "barrier", "monitored", "wrap_tensor")


class Collectives(TorchDispatchMode):
    """Counts the collectives of this rank while it is active: DDP's and FSDP2's own, and those of objects, too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own dispatch comes here again, with what it exchanges
        name = str(func).removesuffix(".default")
        if func.namespace in ("c10d", "_c10d_functional") and not any(part in name for part in _NOT_ONE):
            self.seen.append((name.partition(".")[2].strip("_"), _bytes_sent(args)))
        return func(*args, **(kwargs or {}))


def _bytes_sent(args: Any) -> int:
    """Bytes of the largest tensor list among the arguments: what is reduced or gathered, whole."""
    sizes = [sum(t.numel() * t.element_size() for t in tree_leaves(arg) if isinstance(t, Tensor)) for arg in args]
    return max(sizes, default=0)


class _Steps(TrainerCallback):
    def __init__(self, counting: Collectives) -> None:
        self.counting, self.ends = counting, [0]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(len(self.counting.seen))


def of_one_step(trainer: Any, step: int = 3) -> list[tuple[str, int]]:
    """Train, and give the collectives of one optimiser step: its kind and its bytes each, in order."""
    counting = Collectives()
    steps = _Steps(counting)
    trainer.add_callback(steps)
    with counting:
        trainer.train()
    return counting.seen[steps.ends[step - 1] : steps.ends[step]]
