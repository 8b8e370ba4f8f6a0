"""Completions for which the reward is None: neither solved nor failed, in what is trained on and in what is logged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from branches import largest_difference
from mixing_runs import Late, Recorder, Rolled, demonstrations, grpo
from trl_ext_mixing.pass_rates import pass_rates, summary

from trl_ext.records import Rewards

NAN = float("nan")


def rewards(*values: float, other: Sequence[float] = ()) -> Rewards:
    columns = [list(values)] + ([list(other)] if other else [])
    per_function = torch.tensor(columns).T.contiguous()
    return Rewards(per_function, ("a", "b")[: len(columns)], torch.ones(len(columns)), slice(0, len(values)))


def test_rates_are_over_the_judged_completions() -> None:
    rates = pass_rates(rewards(1, 0, 1, NAN, 0, NAN, NAN, NAN), 2, "", 1.0)
    assert rates.tolist()[:3] == [0.5, 1.0, 0.0]
    assert rates[3].isnan()
    numbers = {name: float(value) for name, value in summary(rates).items()}
    assert numbers == {"unjudged_prompts": 0.25, "pass_rate": 0.5, "solved_prompts": pytest.approx(2 / 3)}
    assert summary(pass_rates(rewards(NAN, NAN), 2, "", 1.0)) == {"unjudged_prompts": 1.0}


def test_the_named_function_has_to_have_judged_and_of_the_sum_any() -> None:
    both = rewards(NAN, NAN, 1, NAN, other=[1, 1, NAN, NAN])
    assert pass_rates(both, 2, "a", 1.0).isnan().tolist() == [True, False]
    assert pass_rates(both, 2, "b", 1.0).isnan().tolist() == [False, True]
    assert pass_rates(both, 2, "", 1.0).tolist() == [1.0, 1.0]


def nobody(completions: Sequence[str], **columns: Any) -> list[float | None]:
    return [None for _ in completions]


def every_other_prompt(completions: Sequence[str], prompts: Sequence[str], **columns: Any) -> list[float | None]:
    """Judges one of two prompts, and its completions fail."""
    return [0.0 if prompt == prompts[0] else None for prompt in prompts]


def metrics(trainer: Any, method: str) -> list[dict[str, float]]:
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{k.split("/")[1]: v for k, v in step.items() if k.startswith(f"{method}/")} for step in steps]


@pytest.mark.parametrize("plugin", ["hpt", "relift:buffer_size=1"])
def test_where_nobody_judged_nothing_is_imitated(tmp_path: Path, plugin: str) -> None:
    """It was 100 %: None counted as a failure. TRL has no advantage for such completions, so the weights stay."""
    seen = Late()
    settings: dict[str, Any] = {"reward": nobody, "optim": "sgd", "max_grad_norm": 0.0, "max_steps": 2}
    trainer = grpo(tmp_path, [plugin, seen], stream=False, data=demonstrations(), **settings)
    trainer.train()
    assert largest_difference(seen.weights[0], seen.weights[-1]) == 0
    for step in metrics(trainer, plugin.split(":")[0]):
        assert step["unjudged_prompts"] == 1.0
        assert "pass_rate" not in step
        assert step.get("sft_prompts", 0.0) == step.get("buffered", 0.0) == step.get("sft_steps", 0.0) == 0.0


@pytest.mark.parametrize("plugin", ["hpt", "relift:buffer_size=100"])
def test_the_prompts_that_were_judged_are_decided_on(tmp_path: Path, plugin: str) -> None:
    settings: dict[str, Any] = {"reward": every_other_prompt, "per_device_train_batch_size": 8, "max_steps": 2}
    trainer = grpo(tmp_path, [plugin], stream=False, data=demonstrations(), **settings)
    trainer.train()
    first, second = metrics(trainer, plugin.split(":")[0])
    assert first["unjudged_prompts"] == second["unjudged_prompts"] == 0.5
    assert first["pass_rate"] == 0.0
    if plugin == "hpt":
        assert first["sft_prompts"] == second["sft_prompts"] == 0.5
    else:
        assert (first["buffered"], second["buffered"]) == (1.0, 2.0)


def test_the_logged_pass_rate_is_over_the_judged_prompts(tmp_path: Path) -> None:
    rolled, seen = Rolled(), Recorder()

    def solved_or_none(completions: Sequence[str], prompts: Sequence[str], **columns: Any) -> list[float | None]:
        return [1.0 if prompt == prompts[0] else None for prompt in prompts]

    settings: dict[str, Any] = {"reward": solved_or_none, "per_device_train_batch_size": 8, "max_steps": 1}
    trainer = grpo(tmp_path, [rolled, "parallel-averaging"], recorder=seen, **settings)
    trainer.train()
    (step,) = metrics(trainer, "parallel-averaging")
    assert (step["pass_rate"], step["solved_prompts"], step["unjudged_prompts"]) == (1.0, 1.0, 0.5)
