"""Two optimisers of one kind on one set of parameters: the weights become the mean of their two one-step branches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trl_ext.errors import ConfigurationError
from trl_ext.gradients import local_tensor
from trl_ext_mixing.comparison import UpdateTally

CHUNK = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Parameters stepped at a time, or one that is larger: of each chunk the starting point and both branches are held, 12
bytes a parameter in fp32. On a CPU they stay in its cache; on a GPU they fill the chip, and take 192 MiB."""

RL, SFT = "rl", "sft"
_COEFFICIENT, _MODE = "sft_coefficient", "weights_for"
"""What the composite remembers in its groups: c of the last step, and whether the weights are those for "train"."""


class BranchAverage(torch.optim.Optimizer):
    """theta <- (1 - c) theta_RL + c theta_SFT, each branch one step of an optimiser with its own state, from theta.

    The RL branch uses `p.grad` and the wrapped optimiser; the SFT branch uses the gradients of `give_sft` and an
    optimiser of the same class and settings with a state of its own. Both share `param_groups`, so schedulers and
    FSDP2, which exchange learning rates and parameters there, reach both. In the state dict each entry carries its
    branch: `exp_avg_rl`, `exp_avg_sft`; so does what an optimiser counts in its groups (`k_rl`, `k_sft` in
    schedule-free ones).

    A step in which no parameter has a gradient does nothing at all: so the core skips a non-finite step.

    Args:
        optimizer: what TRL's arguments chose, not yet stepped.
        lr_ratio: learning rate of the SFT branch over that of the RL branch.

    Raises:
        ConfigurationError: at the first step, where the optimiser estimates something for a group from all of its
            parameters at once (Prodigy); when a state is loaded that only a plain schedule-free optimiser can go on
            with.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, lr_ratio: float = 1.0) -> None:
        self.lr_ratio = lr_ratio
        self.skip_rl = False
        self.branches = {RL: optimizer, SFT: _twin(optimizer)}
        self.updates = UpdateTally()
        self._sft: dict[nn.Parameter, Tensor] = {}
        self._switches = callable(getattr(optimizer, "eval", None))
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._share_groups()

    def _share_groups(self) -> None:
        for group in self.param_groups:
            group.setdefault(_COEFFICIENT, 0.5)
            group.setdefault(_MODE, "train" if not self._switches else "eval")  # schedule-free begins with x
        for branch in self.branches.values():
            branch.param_groups = self.param_groups

    @property
    def coefficient(self) -> float:
        """c, the weight of the SFT branch."""
        return float(self.param_groups[0][_COEFFICIENT])

    @coefficient.setter
    def coefficient(self, value: float) -> None:
        for group in self.param_groups:
            group[_COEFFICIENT] = value

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
        sft, self._sft = self._sft, {}
        rl = {p: p.grad for p in self._parameters if p.grad is not None}
        if not rl:
            return loss
        gradients = {RL: rl, SFT: sft}
        if not sft:
            # torch.distributed.checkpoint creates missing states by a step with zero gradients: both are needed then.
            gradients[SFT] = {p: torch.zeros_like(g) for p, g in rl.items()}
        for p in rl:
            p.grad = None
        try:
            self._average("step", gradients, self.updates if sft else None)
        finally:
            for p in self._parameters:
                p.grad = rl.get(p)
        return loss

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    def _average(
        self, method: str, gradients: Mapping[str, Mapping[nn.Parameter, Tensor]], tally: UpdateTally | None = None
    ) -> None:
        """Call a method of both branches' optimisers from the same weights, and leave the mean of both results.

        Args:
            method: `step`, `train` or `eval`.
            gradients: branch to parameter to gradient.
            tally: told how far each branch moved.
        """
        counted: dict[str, list[dict[str, Any]]] = {}
        for chunk in _chunks(self._parameters):
            theta = [local_tensor(p.detach()) for p in chunk]
            start = _flat(theta)
            if not (self.skip_rl and method == "step"):
                self._run(RL, method, chunk, gradients.get(RL, {}), counted)
            rl = _flat(theta)
            torch._foreach_copy_(theta, _parts(start, theta))
            self._run(SFT, method, chunk, gradients.get(SFT, {}), counted)
            if tally is None:
                self._blend(theta, _parts(rl, theta))
                continue
            rl_update = start - rl
            torch._foreach_sub_(_parts(start, theta), theta)
            self._blend(theta, _parts(rl, theta))
            del rl  # the comparison needs memory of its own
            tally.add(chunk[0], rl_update, start)  # both with the other sign, which no comparison sees
        for branch, groups in counted.items():
            for group, changes in zip(self.param_groups, groups, strict=True):
                group.update({f"{key}_{branch}": value for key, value in changes.items()})
        if tally is not None:
            tally.end_step(sum(p.numel() for p in self._parameters))

    def _blend(self, sft: list[Tensor], rl: list[Tensor]) -> None:
        """Leave (1 - c) rl + c sft in `sft`; `rl` is overwritten."""
        c = self.coefficient
        if c == 0.5:
            # Both products are exact, so this is the mean to the last bit.
            torch._foreach_mul_(sft, 0.5)
            torch._foreach_add_(sft, rl, alpha=0.5)
        else:
            # Not by products: rounded, in bf16 they move weights that neither branch has moved. 0 and 1 are exact.
            torch._foreach_lerp_(rl, sft, c)
            torch._foreach_copy_(sft, rl)

    def _run(
        self,
        branch: str,
        method: str,
        chunk: Sequence[nn.Parameter],
        gradients: Mapping[nn.Parameter, Tensor],
        counted: dict[str, list[dict[str, Any]]],
    ) -> None:
        """Call a method of one branch's optimiser on some of the parameters only.

        What it counts in its groups starts at the same values for each chunk, has to end at the same, and goes into
        `counted`: by group, entry to value.
        """
        optimizer, suffix = self.branches[branch], f"_{branch}"
        before = []
        for group in self.param_groups:
            own = {key.removesuffix(suffix): value for key, value in group.items() if key.endswith(suffix)}
            before.append({**group, **own})
            if branch == SFT and self.lr_ratio != 1.0:
                before[-1]["lr"] = group["lr"] * self.lr_ratio
            if method != "step":  # a step leaves parameters without a gradient alone, the other methods none
                members = set(chunk)
                before[-1]["params"] = [p for p in group["params"] if p in members]
        optimizer.param_groups = [dict(group) for group in before]
        for p in chunk:
            p.grad = gradients.get(p)
        try:
            getattr(optimizer, method)()
            changes = [
                {key: value for key, value in new.items() if value is not old.get(key)}
                for old, new in zip(before, optimizer.param_groups, strict=True)
            ]
        finally:
            optimizer.param_groups = self.param_groups
            for p in chunk:
                p.grad = None
        if counted.setdefault(branch, changes) != changes or any("lr" in change for change in changes):
            names = ", ".join(sorted({key for change in changes for key in change}))
            raise ConfigurationError(
                f"{type(optimizer).__name__} keeps {names} per parameter group and finds them from all of its "
                "parameters at once, but the two branches are stepped a part of them at a time; "
                "choose another `optim`, or mode='gradients'"
            )

    # -- schedule-free -----------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Put the weights to train on in place, where the optimiser evaluates on others (schedule-free)."""
        self._switch_to("train")

    def eval(self) -> None:
        """Put the weights to evaluate in place: the weighted mean of both branches' own.

        In each branch they are x = (y - (1 - beta_1) z) / beta_1 (arXiv:2405.15682, equation 3) from the common y, so
        their mean is the x of the mean of both z, and `train` leads back to y.
        """
        self._switch_to("eval")

    @torch.no_grad()
    def _switch_to(self, mode: str) -> None:
        if self._switches and self.param_groups[0][_MODE] != mode:
            self._average(mode, {})
            for group in self.param_groups:
                group[_MODE] = mode

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
        if self._switches and state_dict["state"] and _MODE not in state_dict["param_groups"][0]:
            raise ConfigurationError(
                f"the checkpoint's state is that of a plain {type(self.branches[RL]).__name__}, whose counters two "
                "branches cannot go on with; give the checkpoint as the model, and start a new run from it"
            )
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
    """Parts of the parameters, each of one dtype, device and sharding."""
    kinds: dict[Any, list[nn.Parameter]] = defaultdict(list)
    for p in parameters:
        layout = (p.device_mesh, p.placements) if isinstance(p, DTensor) else None
        kinds[p.dtype, p.device, layout].append(p)
    for (_, device, _), members in kinds.items():
        limit = CHUNK["cpu" if device.type == "cpu" else "cuda"]
        chunk: list[nn.Parameter] = []
        size = 0
        for p in members:
            n = local_tensor(p.detach()).numel()
            if chunk and size + n > limit:
                yield chunk
                chunk, size = [], 0
            chunk.append(p)
            size += n
        yield chunk


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """One copy of all values, (N,)."""
    return torch.cat([t.flatten() for t in tensors])


def _parts(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The reverse of `_flat`: views in the tensors' shapes."""
    parts = flat.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]
