"""Reward functions called as TRL's `GRPOTrainer` calls them."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from trl_ext.data import refuse_missing_columns
from trl_ext.errors import ConfigurationError
from trl_ext_probing.functions import load_function

RewardFunction = Callable[..., Any]

_FROM_TRL = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
_NOT_PASSED = ("prompt", "completion", "completion_ids")


class Judge:
    """The weighted sum of reward functions, plain or async, each with what TRL passes to it besides the columns.

    As in TRL, a function that gives None for a completion does not count there; where none counts, there is no reward.
    `trainer_state` is a fresh `TrainerState`, since nothing trains here, and what `log_extra` and `log_metric` receive
    is dropped. Async functions run on one event loop, so that a client that they keep open stays usable; leave the
    context to close it.

    Args:
        functions: Name to function of TRL's form.
        columns: Of the data set.
        weights: One for each function, as `reward_weights` of TRL; 1 by default.

    Raises:
        ConfigurationError: A function lacks a column or does not take what TRL passes, or there are other weights.
    """

    def __init__(
        self, functions: Mapping[str, RewardFunction], columns: Iterable[str], weights: Sequence[float] | None = None
    ) -> None:
        listed = list(columns)
        for name, function in functions.items():
            refuse_missing_columns(function, listed, name, given=_FROM_TRL)
        self.name = " + ".join(functions)
        self._functions = dict(functions)
        self._weights = [1.0] * len(functions) if weights is None else list(weights)
        if len(self._weights) != len(functions):
            raise ConfigurationError(f"--reward-weights: {len(self._weights)} weights for {len(functions)} rewards")
        self._given: dict[str, Any] = {}
        self._loop = asyncio.Runner()

    @classmethod
    def of(cls, references: Sequence[str], columns: Iterable[str], weights: Sequence[float] | None = None) -> Judge:
        """Of functions named by text; see `load_function` for its form and errors."""
        return cls({reference: load_function(reference, "--reward") for reference in references}, columns, weights)

    def __call__(
        self,
        rows: Sequence[Mapping[str, Any]],
        texts: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        places: Sequence[int] | None = None,
    ) -> list[float | None]:
        """Rewards of one completion per row; None where no function applies.

        Args:
            rows: With the column `prompt` and those that the functions want.
            texts: The completions; where the prompt is messages they are given as a message too.
            completion_ids: Their tokens.
            places: The rows' numbers for error messages; counted from 0 without.

        Raises:
            ConfigurationError: Another number of rewards, or one that is not a finite number.
        """
        given = {
            "prompts": [row["prompt"] for row in rows],
            "completions": [as_completion(row["prompt"], text) for row, text in zip(rows, texts, strict=True)],
            "completion_ids": [list(ids) for ids in completion_ids],
            **{key: [row[key] for row in rows] for key in rows[0] if key not in _NOT_PASSED},
            **self._from_trainer(),
        }
        numbers = range(len(rows)) if places is None else places
        columns = [self._call(name, given, numbers) for name in self._functions]
        return [_weighted_sum(values, self._weights) for values in zip(*columns, strict=True)]

    def _from_trainer(self) -> dict[str, Any]:
        if not self._given:
            from transformers import TrainerState

            drop: Callable[[str, Any], None] = lambda name, values: None  # noqa: E731
            self._given = {"trainer_state": TrainerState(), "log_extra": drop, "log_metric": drop}
        return self._given

    def _call(self, name: str, given: Mapping[str, Any], places: Sequence[int]) -> list[float | None]:
        values = self._functions[name](**given)
        if inspect.isawaitable(values):
            values = self._loop.run(_wait(values))
        if not isinstance(values, Iterable):
            raise ConfigurationError(f"reward {name} gave a {type(values).__name__}, not a list of rewards")
        listed = list(values)
        if len(listed) != len(places):
            raise ConfigurationError(f"reward {name} gave {len(listed)} rewards for {len(places)} completions")
        return [_number(value, name, place) for value, place in zip(listed, places, strict=True)]

    def __enter__(self) -> Judge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.close()


def as_completion(prompt: Any, text: str) -> Any:
    """A completion as a reward function receives it: text, or a message where the prompt is messages."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def refuse_unjudged(rows: Sequence[int], name: str, what: str) -> None:
    """Refuse prompts of which no completion was judged: to count them as failures would be a wrong score.

    Args:
        rows: Their numbers.
        name: Of the reward function.
        what: What the prompts are, for the message.

    Raises:
        ConfigurationError: There are some.
    """
    if rows:
        shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
        raise ConfigurationError(
            f"reward {name} gave None for every completion of {len(rows)} prompts of {what} (rows {shown}), which have "
            "no score then; leave these rows out of the data"
        )


def mean_of_judged(rewards: Sequence[Sequence[float | None]], name: str, what: str) -> list[float]:
    """Mean reward of each prompt over its completions that were judged.

    Args:
        rewards: For each prompt those of its completions.
        name, what: As for `refuse_unjudged`.

    Raises:
        ConfigurationError: No completion of a prompt was judged, so that it has no score.
    """
    judged = [[value for value in row if value is not None] for row in rewards]
    refuse_unjudged([i for i, row in enumerate(judged) if not row], name, what)
    return [sum(row) / len(row) for row in judged]


def _weighted_sum(values: Sequence[float | None], weights: Sequence[float]) -> float | None:
    counted = [weight * value for value, weight in zip(values, weights, strict=True) if value is not None]
    return sum(counted) if counted else None


def _number(value: Any, name: str, place: int) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigurationError(
            f"reward {name} gave {value!r} for problem {place}; a reward is a finite number, or None where the "
            "function does not apply"
        )
    return number


async def _wait(values: Any) -> Any:
    return await values
