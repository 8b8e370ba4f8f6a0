"""Rewards and advantages that are not numbers: told apart from None as TRL writes it, and named."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from torch import Tensor, nn

from trl_ext.engine.finite_rewards import nan_as_infinite, refuse_non_finite_advantages, reward_fault, without_faults
from trl_ext.errors import NonFiniteError
from trl_ext.testing import ModularChain, tiny_llama, tiny_tokenizer

GIVEN: list[Any] = [1.0, None, math.nan, 0]


def plain(completions: Sequence[str], **columns: Any) -> list[Any]:
    """A reward function of TRL's form."""
    return GIVEN


async def asynchronous(completions: Sequence[str], **columns: Any) -> list[Any]:
    return GIVEN


def test_nan_becomes_infinite_and_none_stays_none() -> None:
    for function in (plain, asynchronous):
        marked: Callable[..., Any] = nan_as_infinite(function)
        values = marked(completions=[""] * 4)
        assert (asyncio.run(values) if inspect.isawaitable(values) else values) == [1.0, None, math.inf, 0]
        assert (marked.__name__, inspect.signature(marked)) == (function.__name__, inspect.signature(function))
    model = nn.Linear(1, 1)
    assert nan_as_infinite(model) is model


def trl_rewards(folder: Path, functions: list[Any]) -> Tensor:
    """What TRL's own trainer makes of four completions' rewards."""
    args = trl.GRPOConfig(
        str(folder), per_device_train_batch_size=4, num_generations=4, use_cpu=True, bf16=False, report_to="none"
    )
    trainer = trl.GRPOTrainer(
        tiny_llama(hidden=16),
        functions,
        args,
        ModularChain().dataset(4, "prompt_only"),
        processing_class=tiny_tokenizer(),
    )
    return trainer._calculate_rewards([{"prompt": ""}] * 4, [""] * 4, [""] * 4, [[1]] * 4)


def test_faults_are_found_in_what_trl_gathers(tmp_path: Path) -> None:
    """None is no fault. A NaN is one where the function passes through `nan_as_infinite`, whatever its kind."""
    functions = [nan_as_infinite(asynchronous), nan_as_infinite(plain), plain]
    rewards = trl_rewards(tmp_path, functions)
    for column in rewards[:, :2].T:
        assert column.tolist() == pytest.approx([1, math.nan, math.inf, 0], nan_ok=True)
    assert rewards[:, 2].tolist() == pytest.approx([1, math.nan, math.nan, 0], nan_ok=True)
    names = ["asynchronous", "plain", "bare"]
    fault = reward_fault(rewards, names, functions)
    assert fault is not None
    assert "'asynchronous' gave a reward that is NaN or infinite for 1 of 4 completions, first for number 2" in fault
    assert reward_fault(rewards[:, 2:], ["bare"], [plain]) is None


def test_a_model_has_no_none() -> None:
    rewards = torch.tensor([[0.0, 0.0], [0.0, math.nan]])
    fault = reward_fault(rewards, ["first", "second"], [plain, nn.Linear(1, 1)])
    assert fault is not None
    assert "'second'" in fault
    assert reward_fault(rewards, ["first", "second"], [plain, plain]) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(3,), (3, 2)])
def test_advantages_are_numbers(value: float, shape: tuple[int, ...]) -> None:
    advantages = torch.zeros(shape)
    refuse_non_finite_advantages(advantages)
    advantages[1] = value
    with pytest.raises(ValueError, match="NaN or infinite for 1 of 3 completions; set nonfinite='skip'"):
        refuse_non_finite_advantages(advantages)


def test_a_fault_stops_the_run_or_takes_the_step_with_it(caplog: pytest.LogCaptureFixture) -> None:
    advantages = torch.tensor([0.5, -0.5])
    with pytest.raises(NonFiniteError, match=r"at step 3 a fault\. Mend the function, or set nonfinite='skip'"):
        without_faults(advantages, "a fault", False, 3)
    assert without_faults(advantages, "a fault", True, 3).isnan().all()
    assert "step 3 is left out: a fault" in caplog.text
