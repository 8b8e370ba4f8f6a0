"""What a training took: counted over interruptions, and without a trace where nobody asks."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import Idle, Plugin, assert_equal_bits
from transformers import TrainerCallback

from trl_ext.jobs import COSTS, Costs, read_costs
from trl_ext.jobs.costs import append_costs
from trl_ext.testing.runs import additions, make_grpo, make_sft, parameters
from trl_ext.trainers.preemption import StopWhereAsked

SIZE = 2
STEPS = 6
"""Of `SIZE` rows each; a checkpoint stands at every second one."""


class Interrupted(Exception):
    pass


def run(folder: Path, plugins: list[Plugin], stop_at: int | None = None, resume: bool = False) -> tuple[dict, int]:
    """Train, and give the parameters and the tokens of the batches; raises at a step where that is wanted."""
    seen = 0
    settings = {
        "max_steps": STEPS,
        "save_steps": 2,
        "save_strategy": "steps",
        "logging_steps": 5,
        "per_device_train_batch_size": SIZE,
    }
    trainer = make_sft(folder, train=additions(STEPS * SIZE), plugins=plugins, **settings)
    step = trainer.training_step

    def counting(model, inputs, items=None):
        nonlocal seen
        if trainer.state.global_step == stop_at:
            raise Interrupted
        seen += int(inputs["attention_mask"].sum())
        return step(model, inputs, items)

    trainer.training_step = counting
    trainer.train(resume_from_checkpoint=resume or None)
    return parameters(trainer), seen


@pytest.mark.parametrize("plugins", [[], [Idle()]], ids=["plain", "plugin"])
def test_tokens_and_steps_are_those_of_the_weights_whatever_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugins: list[Plugin]
) -> None:
    """TRL forgets its count when it resumes without plugins, and keeps it with some."""
    weights, tokens = run(tmp_path / "unasked", plugins)
    monkeypatch.setenv(COSTS, str(tmp_path / "costs.jsonl"))
    for stop_at in (3, 5):  # between checkpoints, and with some tokens counted twice
        with pytest.raises(Interrupted):
            run(tmp_path / "asked", plugins, stop_at, resume=stop_at > 3)
    again, _ = run(tmp_path / "asked", plugins, resume=True)
    assert_equal_bits(again, weights)
    costs = read_costs(tmp_path / "costs.jsonl")
    assert costs is not None
    assert (costs.steps, costs.tokens) == (STEPS, tokens)
    assert costs.peak_memory > 50 * 2**20, "torch alone takes more"


def test_a_checkpoint_that_sigterm_asks_for_finds_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COSTS, str(tmp_path / "costs.jsonl"))
    trainer = make_sft(tmp_path / "run", plugins=[Idle()], enable_jit_checkpoint=True, logging_steps=5)
    (stop,) = (found for found in trainer.callback_handler.callbacks if isinstance(found, StopWhereAsked))
    found = []

    class Asks(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            stop._ask()  # what the handler of the signal comes to, 3 s later

        def on_save(self, args, state, control, **kwargs):
            found.append(read_costs(tmp_path / "costs.jsonl"))

    trainer.add_callback(Asks())
    trainer.train()
    assert [costs and costs.steps for costs in found] == [1]


def test_grpo_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COSTS, str(tmp_path / "costs.jsonl"))
    trainer = make_grpo(tmp_path / "run", max_steps=1)
    trainer.train()
    costs = read_costs(tmp_path / "costs.jsonl")
    assert costs is not None
    assert costs.tokens == trainer.state.num_input_tokens_seen > 0


def test_attempts_add_up_and_a_line_that_was_cut_off_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "costs.jsonl"
    assert read_costs(file) is None
    for attempt, seconds, steps, peak in ((1.0, 2.0, 4, 70), (1.0, 3.0, 6, 90), (2.0, 5.0, 8, 80)):
        append_costs(file, attempt, Costs(seconds, steps, 10 * steps, peak))
    with file.open("a") as cut:
        cut.write('{"attempt": 3.0, "sec')
    assert read_costs(file) == Costs(seconds=8.0, steps=8, tokens=80, peak_memory=90)
