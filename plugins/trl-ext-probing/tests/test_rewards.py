"""Reward functions of every form that TRL takes, called as TRL calls them."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import pytest
import torch
from transformers import TrainerState
from trl_ext_probing.rewards import Judge, mean_of_judged

from trl_ext.errors import ConfigurationError

ROWS = [{"prompt": "1+1=", "answer": "2", "completion": "demonstration"}, {"prompt": "1+2=", "answer": "3"}]
ROWS[1]["completion"] = "another"
COMPLETIONS: tuple[list[str], list[list[int]]] = (["2", "4"], [[50], [52]])


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
    with Judge({"r": function}, ROWS[0]) as judge:
        for _ in range(2):
            assert judge(ROWS, *COMPLETIONS) == [1.0, 0.0]


def test_none_stays_none() -> None:
    with Judge({"r": lambda **kwargs: [None, 0.5]}, ROWS[0]) as judge:
        assert judge(ROWS, *COMPLETIONS) == [None, 0.5]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "good", torch.tensor(float("nan"))])
def test_what_is_no_number_is_refused_with_the_problem_named(value: Any) -> None:
    with Judge({"ours": lambda **kwargs: [1.0, value]}, ROWS[0]) as judge:  # noqa: SIM117
        with pytest.raises(ConfigurationError, match=r"reward ours gave .* for problem 17;"):
            judge(ROWS, *COMPLETIONS, [12, 17])


@pytest.mark.parametrize(("values", "message"), [([1.0], "1 rewards for 2"), (None, "NoneType"), (0.5, "float")])
def test_another_number_of_rewards_is_refused(values: Any, message: str) -> None:
    with Judge({"ours": lambda **kwargs: values}, ROWS[0]) as judge, pytest.raises(ConfigurationError, match=message):
        judge(ROWS, *COMPLETIONS)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completions, level, **kwargs: [], r"wants the column\(s\) level"),
        (lambda prompts, completions, completion_ids, answer: [], r"Add \*\*kwargs"),  # lacks TRL's trainer_state
    ],
)
def test_a_function_that_trl_could_not_call_is_refused_before_anything_is_sampled(function: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Judge({"ours": function}, ROWS[0])


def test_several_rewards_are_added_up_as_trl_does() -> None:
    """As `(rewards * weights).nansum(1)`: None is left out, and where all are None there is no reward."""
    functions = {"a": lambda **kwargs: [1.0, None], "b": lambda **kwargs: [0.5, None]}
    with Judge(functions, ROWS[0], [1.0, -2.0]) as judge:
        assert judge(ROWS, *COMPLETIONS) == [0.0, None]
    functions["b"] = lambda **kwargs: [None, 4.0]
    with Judge(functions, ROWS[0], [1.0, -2.0]) as judge:
        assert judge(ROWS, *COMPLETIONS) == [1.0, -8.0]
    with pytest.raises(ConfigurationError, match="1 weights for 2 rewards"):
        Judge(functions, ROWS[0], [1.0])


def test_messages_are_judged_as_messages() -> None:
    seen: list[Any] = []
    rows = [{"prompt": [{"role": "user", "content": "1+1="}], "answer": "2"}]
    with Judge({"r": lambda completions, **kwargs: seen.extend(completions) or [1.0]}, rows[0]) as judge:
        judge(rows, ["2"], [[50]])
    assert seen == [[{"role": "assistant", "content": "2"}]]


def test_a_prompt_without_a_verdict_has_no_score() -> None:
    assert mean_of_judged([[1.0, None], [0.0, 1.0]], "r", "the data") == [1.0, 0.5]
    with pytest.raises(ConfigurationError, match=r"reward r gave None for every completion of 1 prompts .*\(rows 1\)"):
        mean_of_judged([[1.0], [None]], "r", "the data")
