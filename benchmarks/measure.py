"""What a benchmark of training steps needs: times of steps, peaks of memory, the machine in words."""

from __future__ import annotations

import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback


class StepTimes(TrainerCallback):
    """Seconds of each optimiser step: the processor's on CPU, where other processes do not count; the wall's on CUDA.

    Args:
        device: "cpu" or "cuda".
        optimizer: whether the optimiser's own part is in it; without, a step is its forward, backward and clipping.
    """

    def __init__(self, device: str, optimizer: bool = True) -> None:
        self.device = device
        self.optimizer = optimizer
        self.seconds: list[float] = []

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._began = self._now()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        if not self.optimizer:
            self.seconds.append(self._now() - self._began)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self.optimizer:
            self.seconds.append(self._now() - self._began)


@contextmanager
def peak_memory(device: str) -> Iterator[list[float]]:
    """Puts into the list, on exit, the peak inside the block above the level before it, in MiB.

    Of the allocator on CUDA; of the resident set, sampled every half millisecond, on CPU.
    """
    found: list[float] = []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        found.append((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    process, peak, done = psutil.Process(), 0, threading.Event()
    before = process.memory_info().rss

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, process.memory_info().rss)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield found
    finally:
        done.set()
        sampler.join()
    found.append((peak - before) / 2**20)


def in_own_process(script: str, *arguments: str) -> str:
    """The last line that a script prints; ends this process with the script's errors if it fails."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout.splitlines()[-1]


def hardware(device: str) -> str:
    """The machine in words."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
