"""What every average in training shares: copies of the weights, when they are updated, how they are swapped in.

A method is a subclass that names its copies (`copy_dtypes`), updates them (`update`) and gives the weights to deploy
(`deployed`). Both functions are elementwise on lists of tensors, so they know nothing of shards, devices or chunks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from trl_ext import hookimpl
from trl_ext.errors import CheckpointError, ConfigurationError
from trl_ext.records import RunDescription, SetupContext, WeightsView
from trl_ext_averaging.offload import HostStage

Copies = Mapping[str, list[Tensor]]

CHUNK = 1 << 24
"""Elements handled at a time: the fp32 scratch for low-precision weights stays at 64 MiB."""


def chunks(*columns: Sequence[Tensor], limit: int = CHUNK) -> Iterator[list[list[Tensor]]]:
    """Cut parallel lists of tensors into groups of at most `limit` elements, as views.

    Args:
        columns: lists of N tensors; the i-th tensors of all lists have one shape.

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


def widened(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors in fp32 or wider: the same tensors where they already are, else a scratch copy."""
    if all(tensor.dtype in (torch.float32, torch.float64) for tensor in tensors):
        return tensors
    wide = [torch.empty_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]
    torch._foreach_copy_(wide, tensors)
    return wide


@dataclass(eq=False, kw_only=True)
class OnlineAverage:
    """Base of the averages in training.

    Args:
        start: optimiser steps before averaging begins; until then the raw weights are deployed.
        every: optimiser steps between updates, counted from `start`. A step that was skipped is not averaged.
        parameters: regular expression; only the trainable parameters whose name it matches are averaged.
        device: "model" keeps the copies beside the weights; "cpu" keeps them in host memory and, on CUDA, copies the
            weights on a side stream while the next step computes.
        deploy: what evaluation and the final model use: "raw" or the name of an average; the first average if empty.
        compare: also evaluate the raw weights and all other averages, as `eval_<name>_loss` and so on.
        sampling: GRPO: the name of the average that training completions are drawn from; the policy if empty.
    """

    start: int = 0
    every: int = 1
    parameters: str = ""
    device: Literal["model", "cpu"] = "model"
    deploy: str = ""
    compare: bool = False
    sampling: str = ""

    method: ClassVar[str]
    follows: ClassVar[bool] = True
    """Whether the copies are updated after `start`."""
    requires_api: ClassVar[str] = ">=1.1,<2"  # sampling_weights
    trainers: ClassVar[tuple[str, ...]] = ("sft", "grpo")
    state_version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        name = self.method
        if self.start < 0:
            raise ValueError(f"{name}: start={self.start} is not a number of optimiser steps (0 or more)")
        if self.every < 1:
            raise ValueError(f"{name}: every={self.every} is not a number of optimiser steps (1 or more)")
        if self.device not in ("model", "cpu"):
            raise ValueError(f"{name}: device={self.device!r} is not one of model, cpu")
        if self.deploy not in ("", "raw", *self.averages()):
            raise ValueError(f"{name}: deploy={self.deploy!r} is not one of raw, {', '.join(self.averages())}")
        if self.sampling not in ("", *self.averages()):
            raise ValueError(f"{name}: sampling={self.sampling!r} is not one of {', '.join(self.averages())}")
        try:
            re.compile(self.parameters)
        except re.error as error:
            raise ValueError(f"{name}: parameters={self.parameters!r} is not a regular expression: {error}") from error
        self.state_per_rank = False
        self._step = 0
        self._updates = 0
        self._began = False
        self._names: tuple[str, ...] = ()
        self._selected: list[int] = []
        self._copies: dict[str, list[Tensor]] = {}
        self._stage: HostStage | None = None
        self._fsdp_modules: list[FSDPModule] = []

    # What a method defines.

    def averages(self) -> tuple[str, ...]:
        """Names of the averages, as in metrics and in `deploy`."""
        return (self.method.replace("-", "_"),)

    def copy_dtypes(self) -> Mapping[str, Literal["wide", "exact"]]:
        """Names of the stored copies: "wide" (fp32, or wider where the weights are) or "exact" (as the weights)."""
        return dict.fromkeys(self.averages(), "wide")

    def update(self, copies: Copies, theta: list[Tensor], updates: int, step: int) -> None:
        """Update copies in place with the weights of optimiser step `step`; `updates` counts from 1."""

    def deployed(self, name: str, copies: Copies, theta: list[Tensor]) -> Sequence[Tensor]:
        """The weights of average `name`, given the copies and the raw weights; does not change its arguments."""
        return copies[name]

    def copies_changed(self) -> None:
        """Called after the copies have been written on the weights' device: at the start, updated, or loaded."""

    @property
    def ready(self) -> bool:
        """Whether there is an average to deploy."""
        return self._began

    # Hooks.

    @hookimpl
    def check(self, run: RunDescription) -> None:
        if self.sampling and run.trainer != "grpo":
            raise ConfigurationError(f"sampling={self.sampling!r} is for GRPO, and this is {run.trainer}; remove it")

    @hookimpl
    def setup(self, context: SetupContext) -> None:
        self._selected = [i for i, name in enumerate(context.weights.names) if re.search(self.parameters, name)]
        if not self._selected:
            raise ConfigurationError(
                f"{self.method}: parameters={self.parameters!r} matches none of the "
                f"{len(context.weights.names)} trainable parameters (the first: {context.weights.names[:3]})"
            )
        self.state_per_rank = context.sharded
        self._names = tuple(context.weights.names[i] for i in self._selected)
        self._fsdp_modules = [module for module in context.model.modules() if isinstance(module, FSDPModule)]
        self._step = self._updates = 0
        self._began = False
        theta = self._theta(context.weights)
        if self._stage is not None:
            self._stage.close()
        offload = self.device == "cpu" and any(tensor.is_cuda for tensor in theta)
        self._stage = HostStage(theta) if offload and self.follows else None
        self._copies = {
            copy: [
                torch.empty_like(
                    tensor,
                    device="cpu" if self.device == "cpu" else None,
                    dtype=torch.promote_types(tensor.dtype, torch.float32) if kind == "wide" else None,
                )
                for tensor in theta
            ]
            for copy, kind in self.copy_dtypes().items()
        }
        if self.start == 0:
            self._begin(theta)

    @hookimpl
    def weights_updated(self, weights: WeightsView, step: int, skipped: bool) -> None:
        self._step = step
        if step == self.start:
            self._begin(self._theta(weights))
        elif self.follows and step > self.start and (step - self.start) % self.every == 0 and not skipped:
            self._updates += 1
            updates = self._updates
            self._read(self._theta(weights), lambda theta: self._update_copies(theta, updates, step))

    @hookimpl
    def deployed_weights(
        self, weights: WeightsView
    ) -> AbstractContextManager[None] | dict[str, AbstractContextManager[None]]:
        first = self.deploy or self.averages()[0]
        if not self.compare:
            return self._swapped(weights, first)
        names = [first, *(name for name in ("raw", *self.averages()) if name != first)]
        return {name: self._swapped(weights, name) for name in names}

    @hookimpl
    def sampling_weights(self, weights: WeightsView) -> AbstractContextManager[None] | None:
        return self._swapped(weights, self.sampling) if self.sampling else None

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Counters, and the copies under `<copy>/<parameter>` once averaging has begun (this rank's shards)."""
        self._wait()
        state: dict[str, Any] = {"step": self._step, "updates": self._updates, "began": self._began}
        if self._began:
            for copy, tensors in self._copies.items():
                state |= {f"{copy}/{name}": tensor for name, tensor in zip(self._names, tensors, strict=True)}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state; `setup` comes first.

        Raises:
            CheckpointError: a copy is missing or has another shape, i.e. the options or the model have changed.
        """
        self._wait()
        if state["began"]:
            for copy, tensors in self._copies.items():
                for name, tensor in zip(self._names, tensors, strict=True):
                    saved = state.get(f"{copy}/{name}")
                    if saved is None or saved.shape != tensor.shape:
                        found = "is missing" if saved is None else f"has shape {tuple(saved.shape)}"
                        raise CheckpointError(
                            f"{self.method}: the saved copy {copy!r} of {name} {found}, expected "
                            f"{tuple(tensor.shape)}; resume with the options that the checkpoint was written with"
                        )
                    tensor.copy_(saved)
        self._step, self._updates, self._began = int(state["step"]), int(state["updates"]), bool(state["began"])
        self.copies_changed()

    # Mechanism.

    def _theta(self, weights: WeightsView) -> list[Tensor]:
        local = weights.local()
        return [local[i] for i in self._selected]

    def _wait(self) -> None:
        if self._stage is not None:
            self._stage.wait()

    def _read(self, theta: list[Tensor], use: Callable[[list[Tensor]], None]) -> None:
        """Let `use` see the weights, in host memory and later where the copies are offloaded."""
        if self._stage is not None:
            self._stage.submit(theta, use)
        else:
            use(theta)

    @torch.no_grad()
    def _begin(self, theta: list[Tensor]) -> None:
        self._wait()
        for copies in self._copies.values():
            for copy, tensor in zip(copies, theta, strict=True):
                copy.copy_(tensor)
        self._began = True
        self.copies_changed()

    @torch.no_grad()
    def _update_copies(self, theta: list[Tensor], updates: int, step: int) -> None:
        names = list(self._copies)
        for raw, *copies in chunks(theta, *self._copies.values()):
            self.update(dict(zip(names, copies, strict=True)), widened(raw), updates, step)
        self.copies_changed()

    def _swapped(self, weights: WeightsView, name: str) -> AbstractContextManager[None]:
        if name == "raw" or not self.ready:
            return nullcontext()
        return self._swap(weights, name)

    @contextmanager
    def _swap(self, weights: WeightsView, name: str) -> Iterator[None]:
        """Put average `name` into the model, and afterwards, whatever happens, the raw weights bit for bit."""
        self._wait()
        theta = self._theta(weights)
        raw = [tensor.to("cpu", copy=True) for tensor in theta]  # host memory: a swap costs none on the device
        try:
            self._write(name, theta, raw if self.device == "cpu" else theta)
            yield
        finally:
            with torch.no_grad():
                for tensor, saved in zip(theta, raw, strict=True):
                    tensor.copy_(saved)
            self._drop_gathered()

    @torch.no_grad()
    def _write(self, name: str, target: list[Tensor], theta: list[Tensor]) -> None:
        names = list(self._copies)
        for into, raw, *copies in chunks(target, theta, *self._copies.values()):
            result = self.deployed(name, dict(zip(names, copies, strict=True)), widened(raw))
            for tensor, value in zip(into, result, strict=True):
                tensor.copy_(value)
        self._drop_gathered()

    def _drop_gathered(self) -> None:
        """FSDP2 keeps the root's gathered weights after a forward without backward; they are stale after a swap."""
        for module in self._fsdp_modules:
            module.reshard()
