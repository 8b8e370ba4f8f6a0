"""Runs in which one thing of a plugin fails on one rank, as a fault of its own would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from trl_ext.records import Rewards
from trl_ext.testing.conformance.subject import Subject

Train = Callable[[], Any]
Failure = Callable[[Subject, Path, bool], tuple[Any, Train]]
"""Gives a trainer and its training; the last argument says whether it is to fail on this rank."""

_ELSEWHERE = {"check", "streams", "metrics"}
"""Hooks that are called before there is a trainer, and the one whose failure does not end a run."""


_KNOWN = bool | int | float | str | slice | None


class Poisoned:
    """Stands in for an argument of a hook, and raises whatever is done with it."""

    def _raise(self, *arguments: Any, **named: Any) -> NoReturn:
        raise ArithmeticError("only here")

    def __getattr__(self, name: str) -> NoReturn:
        self._raise()

    __getitem__ = __iter__ = __len__ = __call__ = __bool__ = __float__ = _raise
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __neg__ = _raise
    __lt__ = __le__ = __gt__ = __ge__ = __matmul__ = __pow__ = _raise


def failures(subject: Subject) -> dict[str, Failure]:
    """What of the plugin can fail in a run of its trainer, by name."""
    found: dict[str, Failure] = {hook: partial(_in_hook, hook) for hook in subject.hooks if hook not in _ELSEWHERE}
    if hasattr(subject.plugin, "state_dict"):
        found["state_dict"] = _in_state_dict
    return found


def _in_hook(hook: str, subject: Subject, folder: Path, here: bool) -> tuple[Any, Train]:
    trainer = subject.build(folder / "run", **_of_rank(subject), trainer=subject.held_out())

    def around(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        return partial(_poisoned, call) if name == hook and here else call

    trainer.ext_plugins.wrap(around)

    def train() -> None:
        trainer.train()
        trainer.evaluate()  # of weights that are put in place for it

    return trainer, train


def _poisoned(call: Callable[..., Any], **arguments: Any) -> NoReturn:
    call(**{name: _poison(value) for name, value in arguments.items()})
    raise ArithmeticError("only here")  # the hook touches nothing of its arguments


def _poison(value: Any) -> Any:
    """An argument whose data raise. What all ranks know alike stays: settings and counts, and the rewards of all."""
    if isinstance(value, Rewards | bool | int | float | str):
        return value
    if not is_dataclass(value) or isinstance(value, type):
        return Poisoned()
    data = [field.name for field in fields(value) if not isinstance(getattr(value, field.name), _KNOWN)]
    return replace(value, **{name: Poisoned() for name in data})


def _in_state_dict(subject: Subject, folder: Path, here: bool) -> tuple[Any, Train]:
    """Only the first rank saves a state that is the same on all, so that is where it fails."""
    trainer = subject.build(folder / "run", **_of_rank(subject), save_strategy="steps", save_steps=1)
    plugin = next(active.instance for active in trainer.ext_plugins)
    if here or not getattr(plugin, "state_per_rank", False):
        plugin.state_dict = Poisoned()
    return trainer, trainer.train


def _of_rank(subject: Subject) -> dict[str, Any]:
    return {"per_device_train_batch_size": subject.rows // 2}
