"""`profile`: the trace has every hook of every plugin as a range, and nothing else about the run changes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from helpers import Plugin, assert_equal_bits
from transformers import TrainerCallback

from trl_ext import hookimpl
from trl_ext.records import StreamRequest
from trl_ext.testing.runs import additions, make_sft, parameters
from trl_ext.trainers.profiling import BEFORE

SLEEP = 0.05


class Slow(Plugin):
    """Sleeps in one hook, and has a stream."""

    @hookimpl
    def streams(self):
        return [StreamRequest("general", batch_size=2)]

    @hookimpl
    def gradients_ready(self, gradients, streams):
        time.sleep(SLEEP)
        gradients.axpy_(0.1, streams["general"].gradients)

    @hookimpl
    def metrics(self, mode):
        return {"one": 1.0}


def run(folder: Path, steps: int, **config):
    trainer = make_sft(folder, plugins=[Slow()], streams={"general": additions(8)}, max_steps=steps, **config)
    trainer.train()
    return trainer


def milliseconds_shown(capsys: pytest.CaptureFixture[str]) -> float:
    """What is printed of the slow hook, for each step."""
    shown = capsys.readouterr().out.split("profile: ")[1].splitlines()
    (line,) = (line for line in shown if line.startswith("  Slow.gradients_ready: "))
    return float(line.split()[1])


@pytest.mark.parametrize("steps", [6, 2])
def test_three_steps_are_traced_with_what_each_hook_takes(
    tmp_path: Path, steps: int, capsys: pytest.CaptureFixture[str]
) -> None:
    profiled, plain = run(tmp_path / "profiled", steps, profile=True), run(tmp_path / "plain", steps)
    assert_equal_bits(parameters(profiled), parameters(plain))
    assert not (tmp_path / "plain" / "profile").exists()
    (file,) = (tmp_path / "profiled" / "profile").iterdir()
    assert file.name == "trace-rank0.json"
    events = json.loads(file.read_text())["traceEvents"]
    traced = min(steps, 3)
    durations = {
        hook: [event["dur"] for event in events if event.get("name") == f"trl_ext: Slow.{hook}" and "dur" in event]
        for hook in ("gradients_ready", "stream general", "metrics")
    }
    # A log comes after the step that it is of, so what is logged of the last one is traced no more.
    logged = traced if steps > traced else traced - 1
    assert [len(times) for times in durations.values()] == [traced, traced, logged]
    assert min(durations["gradients_ready"]) >= SLEEP * 1e6  # microseconds
    assert milliseconds_shown(capsys) >= SLEEP * 1e3
    assert profiled.ext_run.guard.named("x").__class__.__name__ == "nullcontext", "no ranges once it is written"


class StopsAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_of_a_training_that_ends_early_the_steps_that_were_traced_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first of the three that were to be."""
    run(tmp_path, 6, profile=True, trainer={"callbacks": [StopsAt(BEFORE + 1)]})
    assert milliseconds_shown(capsys) >= SLEEP * 1e3


@pytest.mark.parametrize("last", range(1, BEFORE + 1))
def test_of_a_training_that_ends_before_a_step_to_trace_nothing_is_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, last: int
) -> None:
    trainer = run(tmp_path, 6, profile=True, trainer={"callbacks": [StopsAt(last)]})
    assert "profile: no step was traced" in caplog.text
    assert not (tmp_path / "profile").exists()
    assert trainer.ext_run.guard.named("x").__class__.__name__ == "nullcontext"


def test_a_training_that_is_resumed_at_its_end_traces_nothing(tmp_path: Path) -> None:
    run(tmp_path, 2, save_steps=2, save_strategy="steps")
    trainer = make_sft(tmp_path, plugins=[Slow()], streams={"general": additions(8)}, max_steps=2, profile=True)
    trainer.train(resume_from_checkpoint=True)
    assert not (tmp_path / "profile").exists()
