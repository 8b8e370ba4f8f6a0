"""A composite of two optimisers of one kind: theta <- (1 - c) theta_RL + c theta_SFT (arXiv:2606.04272).

theta_RL and theta_SFT are the weights after one step of each optimiser from the same theta, each with its own gradient
and its own state.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trl_ext.errors import ConfigurationError
from trl_ext.gradients import local_tensor
from trl_ext_mixing.branch import Branch, twin
from trl_ext_mixing.chunks import chunks, flat, parts
from trl_ext_mixing.comparison import UpdateTally

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
        self.skip_rl = False
        self.branches = {RL: Branch(RL, optimizer), SFT: Branch(SFT, twin(optimizer), lr_ratio)}
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
            branch.optimizer.param_groups = self.param_groups

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
        for chunk in chunks(self._parameters):
            theta = [local_tensor(p.detach()) for p in chunk]
            start = flat(theta)
            if not (self.skip_rl and method == "step"):
                self.branches[RL].call(method, chunk, gradients.get(RL, {}))
            rl = flat(theta)
            torch._foreach_copy_(theta, parts(start, theta))
            self.branches[SFT].call(method, chunk, gradients.get(SFT, {}))
            if tally is None:
                self._blend(theta, parts(rl, theta))
                continue
            rl_update = start - rl
            torch._foreach_sub_(parts(start, theta), theta)
            self._blend(theta, parts(rl, theta))
            del rl  # the comparison needs memory of its own
            tally.add(chunk[0], rl_update, start)  # both with the other sign, which no comparison sees
        for branch in self.branches.values():
            branch.publish_counts()
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
        for branch in self.branches.values():
            for p, entries in branch.optimizer.state.items():
                merged[p].update(branch.named(entries))
        return merged

    @state.setter
    def state(self, value: Any) -> None:
        """Ignored: torch's constructor sets an empty state."""

    def state_dict(self) -> dict[str, Any]:
        """In torch's layout, with `<entry>_rl` and `<entry>_sft` per parameter."""
        saved = {name: branch.optimizer.state_dict() for name, branch in self.branches.items()}
        merged: dict[Any, dict[str, Any]] = {}
        for name, part in saved.items():
            for i, entries in part["state"].items():
                merged.setdefault(i, {}).update(self.branches[name].named(entries))
        return {**saved[RL], "state": merged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; that of a plain optimiser becomes the RL branch's, and the SFT branch starts afresh."""
        optimizer = self.branches[RL].optimizer
        if self._switches and state_dict["state"] and _MODE not in state_dict["param_groups"][0]:
            raise ConfigurationError(
                f"the checkpoint's state is that of a plain {type(optimizer).__name__}, whose counters two "
                "branches cannot go on with; give the checkpoint as the model, and start a new run from it"
            )
        # Each branch loads its own, under the optimiser's own names: torch and bitsandbytes treat entries by name.
        for name, part in _by_branch(state_dict["state"]).items():
            self.branches[name].optimizer.load_state_dict({**state_dict, "state": part})
        self.param_groups = optimizer.param_groups
        self._share_groups()


def _by_branch(state: Mapping[Any, Mapping[str, Any]]) -> dict[str, dict[Any, dict[str, Any]]]:
    """The state of each branch under its optimiser's own names; entries without a branch are the RL branch's."""
    split: dict[str, dict[Any, dict[str, Any]]] = {RL: {}, SFT: {}}
    for i, entries in state.items():
        for key, value in entries.items():
            stem, _, branch = key.rpartition("_")
            if branch in split and stem:
                split[branch].setdefault(i, {})[stem] = value
            else:
                split[RL].setdefault(i, {})[key] = value
    return split
