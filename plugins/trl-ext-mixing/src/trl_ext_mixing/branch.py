"""One of the two optimisers of a composite: a state of its own, and parameters and groups that both share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trl_ext.errors import ConfigurationError


class Branch:
    """An optimiser that is called on a part of its parameters at a time.

    What it counts in its groups (`k` in schedule-free ones) stands in the shared groups under the branch's name
    (`k_rl`), and so do the entries of its state in a state dict (`exp_avg_rl`).

    Args:
        name: what those entries end in.
        optimizer: whose `param_groups` both branches share.
        lr_ratio: learning rate of this branch over that of the groups.
    """

    def __init__(self, name: str, optimizer: torch.optim.Optimizer, lr_ratio: float = 1.0) -> None:
        self.optimizer = optimizer
        self.lr_ratio = lr_ratio
        self._suffix = f"_{name}"
        self._counted: list[dict[str, Any]] | None = None

    def call(self, method: str, chunk: Sequence[nn.Parameter], gradients: Mapping[nn.Parameter, Tensor]) -> None:
        """Call a method of the optimiser on some of the parameters only; `p.grad` of these is None afterwards.

        Args:
            method: `step`, `train` or `eval`.
            chunk: the parameters.
            gradients: parameter to gradient; the others are left alone by a step.

        Raises:
            ConfigurationError: the optimiser estimates something for a group from all of its parameters at once.
        """
        shared = self.optimizer.param_groups
        before = [self._view(group, method, chunk) for group in shared]
        self.optimizer.param_groups = [dict(group) for group in before]
        for p in chunk:
            p.grad = gradients.get(p)
        try:
            getattr(self.optimizer, method)()
            changes = [
                {key: value for key, value in new.items() if value is not old.get(key)}
                for old, new in zip(before, self.optimizer.param_groups, strict=True)
            ]
        finally:
            self.optimizer.param_groups = shared
            for p in chunk:
                p.grad = None
        self._count(changes)

    def _view(self, group: dict[str, Any], method: str, chunk: Sequence[nn.Parameter]) -> dict[str, Any]:
        """A shared group as this branch's optimiser has to see it."""
        view = {**group, **{k.removesuffix(self._suffix): v for k, v in group.items() if k.endswith(self._suffix)}}
        if self.lr_ratio != 1.0:
            view["lr"] = group["lr"] * self.lr_ratio
        if method != "step":  # a step leaves parameters without a gradient alone, the other methods none
            members = set(chunk)
            view["params"] = [p for p in group["params"] if p in members]
        return view

    def _count(self, changes: list[dict[str, Any]]) -> None:
        """Each chunk starts from the same counts, so each has to end with the same."""
        if self._counted is None:
            self._counted = changes
        if self._counted != changes or any("lr" in change for change in changes):
            self._counted = None
            names = ", ".join(sorted({key for change in changes for key in change}))
            raise ConfigurationError(
                f"{type(self.optimizer).__name__} keeps {names} per parameter group and finds them from all of its "
                "parameters at once, but the two branches are stepped a part of them at a time; "
                "choose another `optim`, or mode='gradients'"
            )

    def publish_counts(self) -> None:
        """Write what the calls on all chunks have counted into the shared groups."""
        if self._counted is None:  # this branch was left out
            return
        for group, changes in zip(self.optimizer.param_groups, self._counted, strict=True):
            group.update(self.named(changes))
        self._counted = None

    def named(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Entries of this branch under the names that they have beside those of the other one."""
        return {f"{key}{self._suffix}": value for key, value in entries.items()}


def twin(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimiser of the same class, settings and groups, with an empty state.

    Not `copy.copy`: torch's `__getstate__` keeps only what it knows, and subclasses have attributes of their own.
    """
    made = object.__new__(type(optimizer))
    vars(made).update(vars(optimizer))
    made.state = defaultdict(dict)
    return made
