"""Reward functions called as TRL's `GRPOTrainer` calls them."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from trl_ext.data import refuse_missing_columns
from trl_ext.errors import ConfigurationError

RewardFunction = Callable[..., Any]

_FROM_TRL = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
_NOT_PASSED = ("prompt", "completion", "completion_ids")


def load_reward(path: str) -> RewardFunction:
    """A reward function by dotted path (`package.module.function`, the working directory included) or TRL's by name.

    Raises:
        ConfigurationError: it cannot be imported; the message says why.
    """
    module, _, name = path.rpartition(".")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module or "trl.rewards"), name)
    except (ImportError, AttributeError, ValueError) as error:  # ValueError: "..name" or an empty part
        raise ConfigurationError(f"reward {path!r} cannot be imported: {error}") from None
    if not callable(function):
        raise ConfigurationError(f"reward {path!r} is a {type(function).__name__}, not a function")
    return function


def check_reward(function: RewardFunction, name: str, columns: Iterable[str]) -> None:
    """Refuse a function that cannot be called as TRL would call it with these columns; before anything is sampled.

    Raises:
        ConfigurationError: it lacks a column, or does not take what TRL passes.
    """
    refuse_missing_columns(function, list(columns), name, given=_FROM_TRL)


class Judge:
    """A reward function, plain or async, with what TRL passes to it besides the columns.

    `trainer_state` is a fresh `TrainerState`, since nothing trains here, and what `log_extra` and `log_metric` receive
    is dropped. Async functions run on one event loop, so that a client that they keep open stays usable; leave the
    context to close it.

    Args:
        function: of TRL's form.
        name: what to call it in errors.
        columns: of the data set.

    Raises:
        ConfigurationError: as `check_reward`.
    """

    def __init__(self, function: RewardFunction, name: str, columns: Iterable[str]) -> None:
        from transformers import TrainerState

        check_reward(function, name, columns)
        self._function, self._name = function, name
        self._given = {
            "trainer_state": TrainerState(),
            "log_extra": lambda column, values: None,
            "log_metric": lambda name, value: None,
        }
        import asyncio  # here: a probe's help would load it

        self._loop = asyncio.Runner()

    def __call__(
        self,
        rows: Sequence[Mapping[str, Any]],
        completions: Sequence[tuple[Any, list[int]]],
        problems: Sequence[int] | None = None,
    ) -> list[float | None]:
        """Rewards of one completion per row; None where the function says that it does not apply.

        Args:
            rows: with the column `prompt` and those that the function wants.
            completions: text or messages, with token ids.
            problems: the rows' numbers for error messages; counted from 0 without.

        Raises:
            ConfigurationError: another number of rewards, or one that is not a finite number.
        """
        values = self._function(
            prompts=[row["prompt"] for row in rows],
            completions=[completion for completion, _ in completions],
            completion_ids=[ids for _, ids in completions],
            **{key: [row[key] for row in rows] for key in rows[0] if key not in _NOT_PASSED},
            **self._given,
        )
        if inspect.isawaitable(values):
            values = self._loop.run(_wait(values))
        if not isinstance(values, Iterable):
            raise ConfigurationError(f"reward {self._name} gave a {type(values).__name__}, not a list of rewards")
        listed = list(values)
        if len(listed) != len(rows):
            raise ConfigurationError(f"reward {self._name} gave {len(listed)} rewards for {len(rows)} completions")
        numbers = problems if problems is not None else range(len(rows))
        return [self._number(value, i) for value, i in zip(listed, numbers, strict=True)]

    def _number(self, value: Any, problem: int) -> float | None:
        if value is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ConfigurationError(
                f"reward {self._name} gave {value!r} for problem {problem}; a reward is a finite number, or None where "
                "the function does not apply"
            )
        return number

    def __enter__(self) -> Judge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.close()


async def _wait(values: Any) -> Any:
    return await values
