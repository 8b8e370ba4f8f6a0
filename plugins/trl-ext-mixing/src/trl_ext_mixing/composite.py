"""Two optimisers of one kind on one set of parameters: the weights become the mean of their two one-step branches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trl_ext.errors import ConfigurationError
from trl_ext.gradients import local_tensor
from trl_ext_mixing.comparison import Comparison, products

CHUNK = 1 << 25
"""Parameters stepped at a time: the copies of the starting point and of one branch stay at 2 x 128 MiB in fp32."""

RL, SFT = "rl", "sft"


class BranchAverage(torch.optim.Optimizer):
    """theta <- (1 - c) theta_RL + c theta_SFT, each branch one step of an optimiser with its own state, from theta.

    The RL branch uses `p.grad` and the wrapped optimiser; the SFT branch uses the gradients of `give_sft` and an
    optimiser of the same class and settings with a state of its own. Both share `param_groups`, so schedulers and
    FSDP2, which exchange learning rates and parameters there, reach both. In the state dict each entry carries its
    branch: `exp_avg_rl`, `exp_avg_sft`.

    A step in which no parameter has a gradient does nothing at all: so the core skips a non-finite step.

    Args:
        optimizer: what TRL's arguments chose, not yet stepped. Its `step` may keep counters per parameter only.
        lr_ratio: learning rate of the SFT branch over that of the RL branch.

    Raises:
        ConfigurationError: an optimiser whose weights are not its parameters alone (schedule-free), or, at the first
            step, one that keeps counters in its parameter groups.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, lr_ratio: float = 1.0) -> None:
        if callable(getattr(optimizer, "eval", None)):
            raise ConfigurationError(
                f"{type(optimizer).__name__} keeps other weights for evaluation in its state, and two states would "
                "make two of them; choose another `optim`, or mode='gradients'"
            )
        self.lr_ratio = lr_ratio
        self.coefficient = 0.5
        self.skip_rl = False
        self.branches = {RL: optimizer, SFT: _twin(optimizer)}
        self.updates = UpdateTally()
        self._sft: dict[nn.Parameter, Tensor] = {}
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._share_groups()

    def _share_groups(self) -> None:
        for branch in self.branches.values():
            branch.param_groups = self.param_groups

    def give_sft(self, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        """Hand over the SFT gradients for the next step: parameter to gradient, a DTensor for a DTensor."""
        self._sft = dict(gradients)

    # -- one step ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step both branches from the same weights and average them; `p.grad` is left as it was."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"]]
        sft, self._sft = self._sft, {}
        gradients = {RL: {p: p.grad for p in parameters if p.grad is not None}, SFT: sft}
        if not gradients[RL]:
            return loss
        if not sft:
            # torch.distributed.checkpoint creates missing states by a step with zero gradients: both are needed then.
            gradients[SFT] = {p: torch.zeros_like(g) for p, g in gradients[RL].items()}
        for p in parameters:
            p.grad = None
        try:
            for chunk in _chunks(parameters):
                self._step_chunk(chunk, gradients)
        finally:
            for p in parameters:
                p.grad = gradients[RL].get(p)
        self.updates.end_step()
        return loss

    def _step_chunk(self, chunk: list[nn.Parameter], gradients: Mapping[str, Mapping[nn.Parameter, Tensor]]) -> None:
        """Optimisers leave parameters without a gradient alone, so a chunk is stepped by giving only it gradients."""
        theta = [local_tensor(p.detach()) for p in chunk]
        start = [t.clone() for t in theta]
        if not self.skip_rl:
            self._run(RL, chunk, gradients[RL], 1.0)
        rl = [t.clone() for t in theta]
        torch._foreach_copy_(theta, start)
        self._run(SFT, chunk, gradients[SFT], self.lr_ratio)
        updates = ((t - s for t, s in zip(branch, start, strict=True)) for branch in (rl, theta))
        self.updates.add(chunk, *updates)
        # Both products are exact at 1/2, so the result is the mean of the branches to the last bit; so are 0 and 1.
        torch._foreach_mul_(theta, self.coefficient)
        torch._foreach_add_(theta, rl, alpha=1 - self.coefficient)

    def _run(
        self, branch: str, chunk: list[nn.Parameter], gradients: Mapping[nn.Parameter, Tensor], lr_ratio: float
    ) -> None:
        optimizer = self.branches[branch]
        if lr_ratio != 1.0:
            optimizer.param_groups = [{**group, "lr": group["lr"] * lr_ratio} for group in self.param_groups]
        before = [dict(group) for group in optimizer.param_groups]
        for p in chunk:
            p.grad = gradients.get(p)
        try:
            optimizer.step()
        finally:
            for p in chunk:
                p.grad = None
        for old, new in zip(before, optimizer.param_groups, strict=True):
            if changed := [key for key, value in new.items() if value is not old.get(key)]:
                raise ConfigurationError(
                    f"{type(optimizer).__name__} keeps {', '.join(changed)} per parameter group, which two branches "
                    "cannot share; choose another `optim`, or mode='gradients'"
                )
        optimizer.param_groups = self.param_groups

    # -- state -------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """Parameter to the entries of both branches."""
        merged: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
        for branch, optimizer in self.branches.items():
            for p, entries in optimizer.state.items():
                merged[p].update({f"{key}_{branch}": value for key, value in entries.items()})
        return merged

    @state.setter
    def state(self, value: Any) -> None:
        """Ignored: torch's constructor sets an empty state."""

    def state_dict(self) -> dict[str, Any]:
        """In torch's layout, with `<entry>_rl` and `<entry>_sft` per parameter."""
        saved = {branch: optimizer.state_dict() for branch, optimizer in self.branches.items()}
        merged: dict[Any, dict[str, Any]] = {}
        for branch, part in saved.items():
            for i, entries in part["state"].items():
                merged.setdefault(i, {}).update({f"{key}_{branch}": value for key, value in entries.items()})
        return {**saved[RL], "state": merged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; that of a plain optimiser becomes the RL branch's, and the SFT branch starts afresh."""
        parts: dict[str, dict[Any, dict[str, Any]]] = {RL: {}, SFT: {}}
        for i, entries in state_dict["state"].items():
            for key, value in entries.items():
                stem, _, branch = key.rpartition("_")
                if branch in parts and stem:
                    parts[branch].setdefault(i, {})[stem] = value
                else:
                    parts[RL].setdefault(i, {})[key] = value
        # Each branch loads its own, under the optimiser's own names: torch and bitsandbytes treat entries by name.
        for branch, optimizer in self.branches.items():
            optimizer.load_state_dict({**state_dict, "state": parts[branch]})
        self.param_groups = self.branches[RL].param_groups
        self._share_groups()


class UpdateTally:
    """Comparisons of both updates, kept on the device until they are read."""

    NAMES = ("update_norm_rl", "update_norm_sft", "update_cosine", "update_sign_conflicts")

    def __init__(self) -> None:
        self._step: list[Tensor] = []
        self._total: Tensor | None = None
        self._steps = 0

    def add(self, parameters: Sequence[Tensor], rl: Iterable[Tensor], sft: Iterable[Tensor]) -> None:
        """Add the updates of some parameters, as local tensors."""
        self._step.append(products(parameters, rl, sft))

    def end_step(self) -> None:
        """Close an optimiser step."""
        step = Comparison.of(torch.stack(self._step).sum(0))
        self._step.clear()
        values = torch.stack([step.norm_a, step.norm_b, step.cosine, step.sign_conflicts])
        self._total = values if self._total is None else self._total + values
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Means per step since the last reading; empty before the first step."""
        if self._total is None:
            return {}
        values = dict(zip(self.NAMES, (self._total / self._steps).tolist(), strict=True))
        self._total, self._steps = None, 0
        return values


def as_gradient(parameter: nn.Parameter, local: Tensor) -> Tensor:
    """A local gradient in the form that `parameter.grad` has: a DTensor for a DTensor, sharing memory."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _twin(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimiser of the same class, settings and groups, with an empty state.

    Not `copy.copy`: torch's `__getstate__` keeps only what it knows, and subclasses have attributes of their own.
    """
    twin = object.__new__(type(optimizer))
    vars(twin).update(vars(optimizer))
    twin.state = defaultdict(dict)
    return twin


def _chunks(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    chunk: list[nn.Parameter] = []
    size = 0
    for p in parameters:
        n = local_tensor(p.detach()).numel()
        if chunk and size + n > CHUNK:
            yield chunk
            chunk, size = [], 0
        chunk.append(p)
        size += n
    if chunk:
        yield chunk
