"""What every benchmark measures with: step times, peak memory, and the machine in words."""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import trl
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback


class StepTimes(TrainerCallback):
    """Seconds of each optimiser step, from `on_step_begin` to `on_step_end`.

    On CPU the processor's time, of all threads: other processes do not count. On CUDA the wall's.

    Args:
        device: "cpu" or "cuda".
        optimizer: whether the optimiser's own part counts; without it a step is its forward, backward and clipping.
    """

    def __init__(self, device: str, optimizer: bool = True) -> None:
        self.device = device
        self.optimizer = optimizer
        self.seconds: list[float] = []

    def now(self) -> float:
        """Seconds, on the device's clock."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = self.now()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        if not self.optimizer:
            self.seconds.append(self.now() - self._start)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self.optimizer:
            self.seconds.append(self.now() - self._start)


def fastest_step(trainer: Any, device: str, warm_up: int = 1, optimizer: bool = True) -> float:
    """Train, and give the seconds of the fastest step after the first `warm_up`.

    All steps do the same work, and whatever else a machine does only ever adds to one.
    """
    clock = StepTimes(device, optimizer)
    trainer.add_callback(clock)
    trainer.train()
    trainer.remove_callback(clock)
    return min(clock.seconds[warm_up:])


def timed_method(owner: type, name: str, device: str) -> list[float]:
    """Replace a method by itself with a clock, and give the list that the seconds of each call go to.

    What a plugin adds to a step is often far below the noise of whole steps.
    """
    seconds: list[float] = []
    method, clock = getattr(owner, name), StepTimes(device)

    @functools.wraps(method)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = clock.now()
        try:
            return method(*args, **kwargs)
        finally:
            seconds.append(clock.now() - start)

    setattr(owner, name, timed)
    return seconds


def peak_memory(train: Callable[[], Any], device: str) -> int:
    """Bytes of tensors at the peak of `train()` above the level before it, as the device's allocator counts them.

    On CPU torch's profiler listens, which slows everything down: time another training.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train()
        return torch.cuda.max_memory_allocated() - before
    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            train()
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")


def in_own_process(script: str, *arguments: str) -> Any:
    """Run a benchmark's script again with these arguments: what its last line of output says, as JSON."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def one_thread(device: str) -> None:
    """On CPU let one thread do all: threads that wait for each other make processor times depend on the neighbours."""
    if device == "cpu":
        torch.set_num_threads(1)


def hardware(device: str) -> str:
    """The machine and the versions in words."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    machine = f"{torch.cuda.get_device_name()}, " if device == "cuda" else ""
    machine += f"{cpu} x {os.cpu_count()}, {torch.get_num_threads()} thread(s)"
    return f"{machine}, torch {torch.__version__}, TRL {trl.__version__}"
