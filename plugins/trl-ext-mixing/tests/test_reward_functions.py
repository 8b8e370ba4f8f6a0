"""Reward functions of every form that TRL takes, called as TRL calls them."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import pytest
import torch
from transformers import TrainerState
from trl_ext_mixing.reward_functions import Judge, load_reward

from trl_ext.errors import ConfigurationError

ROWS = [{"prompt": "1+1=", "answer": "2", "completion": "demonstration"}, {"prompt": "1+2=", "answer": "3"}]
ROWS[1]["completion"] = "another"
COMPLETIONS: list[tuple[Any, list[int]]] = [("2", [50]), ("4", [52])]


def plain(prompts: list[str], completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    assert prompts == ["1+1=", "1+2="]
    assert kwargs.pop("completion_ids") == [[50], [52]]
    assert kwargs.keys() == {"trainer_state", "log_extra", "log_metric"}
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


async def waiting(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    await asyncio.sleep(0)
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def logging(
    completions: list[str], answer: list[str], trainer_state: Any, log_extra: Any, log_metric: Any, **kwargs: Any
) -> list[float]:
    assert isinstance(trainer_state, TrainerState)
    assert trainer_state.global_step == 0
    log_extra("given", answer)
    log_metric("share", 0.5)
    return [1.0, 0.0]


class Waits:
    """A client that belongs to one event loop, as those of HTTP libraries do."""

    def __init__(self) -> None:
        self.loop: Any = None

    async def __call__(self, **kwargs: Any) -> list[float]:
        self.loop = self.loop or asyncio.get_running_loop()
        assert self.loop is asyncio.get_running_loop()
        return [1.0, 0.0]


@pytest.mark.parametrize(
    "function",
    [
        plain,
        waiting,
        functools.partial(waiting),
        Waits(),
        logging,
        lambda **kwargs: torch.tensor([1.0, 0.0]),
        lambda **kwargs: (value for value in (True, False)),
    ],
)
def test_every_form_gives_its_rewards(function: Any) -> None:
    with Judge(function, "r", ROWS[0]) as judge:
        for _ in range(2):
            assert judge(ROWS, COMPLETIONS) == [1.0, 0.0]


def test_none_stays_none() -> None:
    with Judge(lambda **kwargs: [None, 0.5], "r", ROWS[0]) as judge:
        assert judge(ROWS, COMPLETIONS) == [None, 0.5]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "good", torch.tensor(float("nan"))])
def test_what_is_no_number_is_refused_with_the_problem_named(value: Any) -> None:
    with Judge(lambda **kwargs: [1.0, value], "ours", ROWS[0]) as judge:  # noqa: SIM117
        with pytest.raises(ConfigurationError, match=r"reward ours gave .* for problem 17;"):
            judge(ROWS, COMPLETIONS, [12, 17])


@pytest.mark.parametrize(("values", "message"), [([1.0], "1 rewards for 2"), (None, "NoneType"), (0.5, "float")])
def test_another_number_of_rewards_is_refused(values: Any, message: str) -> None:
    with Judge(lambda **kwargs: values, "ours", ROWS[0]) as judge, pytest.raises(ConfigurationError, match=message):
        judge(ROWS, COMPLETIONS)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completions, level, **kwargs: [], r"wants the column\(s\) level"),
        (lambda prompts, completions, completion_ids, answer: [], r"Add \*\*kwargs"),  # lacks TRL's trainer_state
    ],
)
def test_a_function_that_trl_could_not_call_is_refused_before_anything_is_sampled(function: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Judge(function, "ours", ROWS[0])


@pytest.mark.parametrize("path", ["no.such.reward", "json.nothing", "nothing", "a..b", "math.pi"])
def test_a_reward_that_cannot_be_imported_is_refused(path: str) -> None:
    with pytest.raises(ConfigurationError, match=f"reward {path!r}") as caught:
        load_reward(path)
    assert caught.value.__cause__ is None, "so that the command line shows no traceback"
