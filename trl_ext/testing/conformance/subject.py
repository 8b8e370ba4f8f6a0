"""The plugin under test, and the tiny runs that it is tried in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from trl_ext.hookspecs import HOOKS, REWARDED, SAMPLING
from trl_ext.plugins.implementations import marked_hooks
from trl_ext.records import Column, StreamRequest, TrainerKind
from trl_ext.testing.conformance.filling import filled
from trl_ext.testing.conformance.sampling import sample_by_row
from trl_ext.testing.runs import MAKE, additions, logged, parameters, rows

T = TypeVar("T")

ROWS = {"sft": 4, "grpo": 8, "dpo": 4, "kto": 4, "rloo": 8, "reward": 4, "distillation": 8}
"""Rows of an optimiser step, over all micro-batches and ranks."""
RANKS = 2
"""Ranks of a run on several."""
STEPS = 3
# Plain SGD keeps what differs by rounding of the size of rounding; the rate makes every step visible.
_SGD = {"optim": "sgd", "learning_rate": 0.2}
_SAMPLING = {"max_completion_length": 4}
SETTINGS: dict[str, dict[str, Any]] = {
    "sft": _SGD,
    "grpo": {**_SGD, **_SAMPLING, "num_generations": 4},
    "dpo": _SGD,
    "kto": {**_SGD, "loss_type": "apo_zero_unpaired"},  # KTO's own estimates a KL term within each micro-batch
    "rloo": {**_SGD, **_SAMPLING, "num_generations": 4},
    "reward": _SGD,
    "distillation": {**_SGD, **_SAMPLING},
}
APART = 1e-4
"""How far two runs may part by rounding: the norm of their difference over that of what the training has changed. Sums
in fp32 are off by about 1e-6 of the gradient in another order, and three steps carry that on."""


@dataclass
class Run:
    """A finished training."""

    trainer: Any
    plugin: Any
    """The instance that it used; None without one."""
    start: dict[str, Tensor]
    parameters: dict[str, Tensor]
    logs: list[dict[str, Any]]
    state: dict[str, Any]
    """What the plugin would keep in a checkpoint at the end."""

    def change(self) -> float:
        """Norm of what the training has changed."""
        return distance(self.parameters, self.start)


@dataclass(eq=False)
class Subject:
    """A plugin and what its runs need.

    The plugin itself is never run: every run gets a copy of it.
    """

    plugin: Any
    trainer: TrainerKind
    streams: Mapping[str, Any] | None = None
    reward: Callable[..., Any] | None = None
    formula: Callable[..., Any] | None = None
    dataset: Any = None
    config: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, str] = field(default_factory=dict)
    """What this instance's options do not support, beside what its class declares."""
    _known: dict[str, Any] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_known": {}}  # finished runs stay where they are

    @cached_property
    def hooks(self) -> tuple[str, ...]:
        """Names of the hooks that the plugin has and the trainer calls, in the order of the contract."""
        return tuple(name for name in marked_hooks(self.plugin) if self.trainer in HOOKS[name].trainers)

    @property
    def unsupported(self) -> Mapping[str, str]:
        """What the plugin does not support, with its reasons."""
        return {**getattr(self.plugin, "unsupported", {}), **self.limits}

    @cached_property
    def data(self) -> Any:
        """The training data: the author's, or sums of two numbers, with the columns that the plugin reads."""
        if self.dataset is not None:
            return self.dataset
        return filled(rows(self.trainer, 16 if self.trainer in SAMPLING else 24), self.columns)

    def held_out(self) -> dict[str, Any]:
        """Arguments of a trainer that evaluates too."""
        return {"eval_dataset": self.data.select(range(4))}

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns that the plugin reads."""
        return tuple(getattr(self.plugin, "columns", ()))

    @property
    def rows(self) -> int:
        """Rows of an optimiser step over all ranks."""
        return ROWS[self.trainer]

    def build(
        self,
        folder: Path,
        plugin: Any = None,
        *,
        plain: bool = False,
        then: Callable[[Any], None] = lambda trainer: None,
        **settings: Any,
    ) -> Any:
        """A trainer of a tiny model.

        Args:
            folder: the run's.
            plugin: the instance to use; a copy of the author's where None.
            plain: leave the plugin out.
            then: what to do with the trainer.
            **settings: of the config; `model`, `train`, `streams` and `trainer` as for `make_sft`.
        """
        plugins = [] if plain else [plugin or copy.deepcopy(self.plugin)]
        common = {"per_device_train_batch_size": self.rows, "max_steps": STEPS, **SETTINGS[self.trainer]}
        settings = {**common, **self.config, **settings}
        settings.setdefault("train", self.data)
        settings.setdefault("streams", self._streams())
        if self.trainer in REWARDED and self.reward is not None:
            settings["reward"] = self.reward
        if plain:
            del settings["streams"]
        trainer = MAKE[self.trainer](folder, plugins=plugins, **settings)
        if self.trainer in SAMPLING:
            sample_by_row(trainer)
        _share_streams(trainer)
        then(trainer)
        return trainer

    def run(self, folder: Path, plugin: Any = None, *, resume: Path | None = None, **settings: Any) -> Run:
        """Train a tiny model; the arguments are those of `build`."""
        trainer = self.build(folder, plugin, **settings)
        return finished(trainer, resume)

    def once(self, what: str, find: Callable[[], T]) -> T:
        """What `find` gives, found once for all cases of this plugin."""
        if what not in self._known:
            self._known[what] = find()
        found: T = self._known[what]
        return found

    def usual(self, folder: Path) -> Run:
        """The run with no setting of its own, which many cases compare with; made once, in the first one's folder."""
        return self.once("usual", lambda: self.run(folder / "usual", trainer=self.held_out()))

    def without(self, folder: Path) -> Run:
        """The same without the plugin."""
        return self.once("without", lambda: self.run(folder / "without", plain=True, trainer=self.held_out()))

    def _streams(self) -> dict[str, Any]:
        """The author's data for the plugin's streams, or else sums for each role that it asks for."""
        if self.streams is not None:
            return dict(self.streams)
        return {
            request.role: filled(additions(16, seed=3 + i), self.columns) for i, request in enumerate(self.requests())
        }

    def requests(self) -> list[StreamRequest]:
        """The streams that the plugin asks for and cannot do without."""
        asked = copy.deepcopy(self.plugin).streams() if "streams" in self.hooks else ()
        return [request for request in asked if not request.optional]


def _share_streams(trainer: Any) -> None:
    """Let streams draw on one rank the rows that two ranks draw together: plugins ask for a number of rows a rank."""
    for stream in trainer.ext_streams.values():
        rows = stream.request.batch_size * RANKS // stream.world_size
        stream.request = replace(stream.request, batch_size=rows)


def finished(trainer: Any, resume: Path | None = None) -> Run:
    """Train, and keep what is compared."""
    start = parameters(trainer)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    plugin = next((active.instance for active in trainer.ext_plugins), None)
    return Run(trainer, plugin, start, parameters(trainer), logged(trainer), state_of(plugin))


def state_of(plugin: Any) -> dict[str, Any]:
    """A copy of what a plugin would keep in a checkpoint now."""
    return copy.deepcopy(plugin.state_dict()) if hasattr(plugin, "state_dict") else {}


def distance(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Norm of the difference of two sets of parameters."""
    return float(torch.stack([(mine[name].double() - theirs[name].double()).norm() for name in mine]).norm())


def require_close(mine: Run, theirs: Run, what: str, bound: float = APART) -> None:
    """Hold two trainings against one another, by what they have changed.

    Raises:
        AssertionError: they differ by more than `bound` of that, or changed nothing.
    """
    assert theirs.change() > 0, "the training changed no weight, so that there is nothing to compare"
    apart = distance(mine.parameters, theirs.parameters) / theirs.change()
    assert apart <= bound, (
        f"{what}: the trained weights differ by {apart:.2g} of what the training has changed, where rounding explains "
        f"{bound:g}"
    )


def require_same_bits(mine: Mapping[str, Any], theirs: Mapping[str, Any], what: str) -> None:
    """Hold two mappings against one another, tensors to the last bit.

    Raises:
        AssertionError: naming what differs.
    """
    assert set(mine) == set(theirs), f"{what}: there are {sorted(mine)} and {sorted(theirs)}"
    different = [name for name in mine if not same(mine[name], theirs[name])]
    assert not different, f"{what}: {len(different)} of {len(mine)} differ, first {different[0]!r}"


def same(mine: Any, theirs: Any) -> bool:
    """Whether two values are equal, types of containers and bits of tensors included; NaN equals NaN."""
    if type(mine) is not type(theirs):
        return False
    if isinstance(mine, Tensor):
        return mine.shape == theirs.shape and mine.dtype == theirs.dtype and torch.equal(_bits(mine), _bits(theirs))
    if isinstance(mine, Mapping):
        return list(mine) == list(theirs) and all(same(mine[key], theirs[key]) for key in mine)
    if isinstance(mine, list | tuple):
        return len(mine) == len(theirs) and all(map(same, mine, theirs))
    return bool(mine == theirs or (mine != mine and theirs != theirs))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)
