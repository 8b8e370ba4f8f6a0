"""`profile`: a trace of three optimiser steps, in which every call of a plugin is a range with its name."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule
from transformers import TrainerCallback

from trl_ext.engine.guard import Guard
from trl_ext.trainers.costs import peak_memory

logger = logging.getLogger(__name__)

STEPS = 3
"""Steps that are traced."""
BEFORE = 2
"""Steps that go before, whose first calls compile and allocate; none where the run has no more than those to trace."""
FOLDER = "profile"
PREFIX = "trl_ext: "
"""Of the names of the ranges."""


class ProfileCallback(TrainerCallback):
    """Traces steps of a training from its first ones on, writes the trace, and prints what each hook took.

    Args:
        guard: Calls the hooks; it names the ranges while this callback traces.
        folder: Of the run.
        rank: Each rank writes a trace of its own, and the first one prints.
    """

    def __init__(self, guard: Guard, folder: Path, rank: int) -> None:
        self.guard = guard
        self.folder = folder / FOLDER
        self.rank = rank
        self.profiler: profile | None = None
        self.first = self.traced = 0
        self.began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        left = state.max_steps - state.global_step
        if left < 1:  # resumed at its end
            return
        before = BEFORE if left >= BEFORE + STEPS else 0
        self.first = state.global_step + before
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        plan = schedule(wait=0, warmup=before, active=min(STEPS, left), repeat=1)
        self.profiler = profile(activities=activities, schedule=plan, on_trace_ready=self._write, acc_events=True)
        self.guard.named = lambda name: record_function(PREFIX + name)
        self.profiler.start()
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.profiler is not None:
            self.traced = state.global_step - self.first
            self.profiler.step()
            if state.global_step == self.first:
                self.began = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.profiler is not None:
            self.profiler.stop()  # which writes, where there were fewer steps than were to be traced
        if self.profiler is not None:  # there were none
            self._leave()

    def _leave(self) -> None:
        self.profiler = None
        del self.guard.named
        if self.traced < 1:
            logger.warning("profile: no step was traced; the training ended within its first %d steps", BEFORE)

    def _write(self, profiler: profile) -> None:
        seconds = time.perf_counter() - self.began
        self._leave()
        if self.traced < 1:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"trace-rank{self.rank}.json"
        profiler.export_chrome_trace(str(path))
        if self.rank == 0:
            step = 1e3 * seconds / self.traced
            head = f"profile: {path}: {step:.2f} ms a step, peak memory so far {peak_memory() / 1e9:.2f} GB"
            print("\n".join([head, *summary(profiler.events(), self.traced, step)]), flush=True)


def summary(events: Any, steps: int, step: float) -> Iterator[str]:
    """A line for each named range: milliseconds a step, its share of the step, and the time that it takes on a device.

    The backward of what a hook computes is no part of its range.

    Args:
        events: Of the profiler.
        steps: That were traced.
        step: Milliseconds of one.
    """
    times: dict[str, tuple[float, float]] = {}
    for event in events:
        if event.name.startswith(PREFIX) and event.device_type == torch.autograd.DeviceType.CPU:
            host, device = times.get(event.name, (0.0, 0.0))
            times[event.name] = host + event.time_range.elapsed_us(), device + event.device_time_total
    for name, (host, device) in sorted(times.items(), key=lambda item: -max(item[1])):
        host, device = host / 1e3 / steps, device / 1e3 / steps
        on_device = f", {device:.2f} ms on the device" if device else ""
        yield f"  {name.removeprefix(PREFIX)}: {host:.2f} ms a step ({host / step:.1%}){on_device}"
