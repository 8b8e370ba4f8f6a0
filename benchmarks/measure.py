"""What every benchmark measures with: step times, peak memory, and the machine in words."""

from __future__ import annotations

import functools
import gc
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Semaphore
from typing import Any

import numpy as np
import torch
import trl
from scipy.stats import quantile_test
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback


def settings(device: str, steps: int, **more: Any) -> dict[str, Any]:
    """What all trainings here have in common: `steps` steps, nothing evaluated, saved or reported."""
    common = {"max_steps": steps, "logging_steps": steps, "save_strategy": "no", "report_to": "none"}
    return {**common, "use_cpu": device == "cpu", "bf16": device == "cuda", "disable_tqdm": True, **more}


def seconds_now(device: str) -> float:
    """Seconds: on CPU the processor's, of all threads, so that other processes do not count; on CUDA the wall's."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


class Baton:
    """Lets one of several threads run at a time; in each turn every one once, in an order drawn anew.

    What a thread leaves in caches and in the allocator counts for the next one: with a fixed order it would count for
    the same arm each time.

    Args:
        threads: how many there are; told apart by their number.
    """

    def __init__(self, threads: int) -> None:
        self.locks = [Semaphore(0) for _ in range(threads)]
        self.running = set(range(threads))
        self._turn: list[int] = []
        self._random = random.Random(0)

    def wait(self, thread: int) -> None:
        """Until it is this thread's turn."""
        self.locks[thread].acquire()

    def hand_on(self) -> None:
        """Let the next thread run that has not ended."""
        self._turn = [thread for thread in self._turn if thread in self.running]
        if not self._turn:
            self._turn = self._random.sample(sorted(self.running), len(self.running))
        if self._turn:
            self.locks[self._turn.pop()].release()


class Turns(TrainerCallback):
    """Holds a training up between its steps until its turn comes, and takes the time of each step.

    Args:
        device: "cpu" or "cuda".
        baton: shared with the other trainings.
        thread: this training's number.
        optimizer: whether the optimiser's own part counts; without it a step is its forward, backward and clipping.
        steps: of one turn; the device is waited for at its end alone.
        settle: called at the end of a turn, to wait for what else the training has begun.
    """

    def __init__(
        self, device: str, baton: Baton, thread: int, optimizer: bool, steps: int, settle: Callable[[], Any]
    ) -> None:
        self.device, self.baton, self.thread, self.optimizer = device, baton, thread, optimizer
        self.steps, self.settle, self.done = steps, settle, 0
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.done % self.steps == 0:
            self._start = seconds_now(self.device)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        if not self.optimizer:
            self._without = seconds_now(self.device) - self._start

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.done += 1
        if self.done % self.steps:
            return
        self.settle()
        whole = seconds_now(self.device) - self._start
        self.seconds.append(whole / self.steps if self.optimizer else self._without)
        self.baton.hand_on()
        self.baton.wait(self.thread)


def steps_in_turn(
    trainers: Mapping[str, Any],
    device: str,
    warm_up: int = 2,
    without_optimizer: Collection[str] = (),
    per_turn: int = 1,
    settle: Callable[[str], Any] = lambda arm: None,
) -> dict[str, np.ndarray]:
    """Train all together, one step of each in turn, in one process.

    A machine's speed drifts by several per cent within minutes; the steps of one turn are neighbours and share it.

    Args:
        trainers: by arm; all of the same number of steps.
        device: "cpu" or "cuda".
        warm_up: first turns that do not count.
        without_optimizer: arms whose steps end before the optimiser's; with one step a turn.
        per_turn: steps of a turn, of which the trainers have a multiple. More than one where a step's work runs on
            beside the next.
        settle: called with an arm at the end of its turn, to wait for what else it has begun.

    Returns:
        seconds of a step of each arm, (turns - warm_up,), the same index in the same turn.
    """
    baton = Baton(len(trainers))
    clocks = {
        arm: Turns(device, baton, i, arm not in without_optimizer, per_turn, functools.partial(settle, arm))
        for i, arm in enumerate(trainers)
    }

    def train(trainer: Any, clock: Turns) -> None:
        baton.wait(clock.thread)
        try:
            trainer.train()
        finally:
            baton.running.discard(clock.thread)
            baton.hand_on()

    with ThreadPoolExecutor(len(trainers)) as pool:
        runs = []
        for arm, trainer in trainers.items():
            trainer.add_callback(clocks[arm])
            runs.append(pool.submit(train, trainer, clocks[arm]))
        baton.hand_on()
        for run in runs:
            run.result()
    return {arm: np.array(clock.seconds[warm_up:]) for arm, clock in clocks.items()}


@dataclass(frozen=True)
class Ratio:
    """Median over turns of an arm's time over another's in the same turn, and its 95 % confidence interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def ratio(seconds: np.ndarray, base: np.ndarray) -> Ratio:
    """Of two arms' seconds, (turns,) each. The interval is the exact one for a median, from order statistics."""
    ratios = seconds / base
    interval = quantile_test(ratios, q=1, p=0.5).confidence_interval()
    return Ratio(float(np.median(ratios)), float(interval.low), float(interval.high))


def against_plain(
    arm: str, plain: str, times: Mapping[str, np.ndarray], memory: Mapping[str, int]
) -> tuple[dict[str, Any], str]:
    """An arm's entry for the report and its row of the table: ms a step, their ratio, MiB at the peak, their ratio.

    Args:
        arm: its name.
        plain: that of the arm whose time and memory count as 1.
        times: seconds of a step of each arm, (turns,).
        memory: bytes at the peak of each arm; none where it was not measured.
    """
    time, ms = ratio(times[arm], times[plain]), 1e3 * float(np.median(times[arm]))
    entry: dict[str, Any] = {"ms": ms, "ratios": {"plain": asdict(time)}}
    cells = [arm, f"{ms:.2f}", str(time), "", ""]
    if memory:
        entry |= {"peak_mib": memory[arm] / 2**20, "memory_ratio": memory[arm] / memory[plain]}
        cells[3:] = f"{entry['peak_mib']:.0f}", f"{entry['memory_ratio']:.3f}"
    return entry, f"| {' | '.join(cells)} |"


def timed_method(
    owner: type, name: str, device: str, settle: Callable[[Any], Any] = lambda self: None
) -> dict[int, list[float]]:
    """Replace a method by itself with a clock, and give what the seconds of each call go to, by the object's id.

    What a plugin adds to a step is often far below the noise of whole steps. `settle` is called with the object before
    the clock stops, to wait for what the method has begun.
    """
    seconds: dict[int, list[float]] = defaultdict(list)
    method = getattr(owner, name)

    @functools.wraps(method)
    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        start = seconds_now(device)
        try:
            return method(self, *args, **kwargs)
        finally:
            settle(self)
            seconds[id(self)].append(seconds_now(device) - start)

    setattr(owner, name, timed)
    return seconds


def peak_memory(train: Callable[[], Any], device: str) -> int:
    """Bytes of tensors at the peak of `train()` above the level before it, as the device's allocator counts them.

    On CPU torch's profiler listens, which slows everything down: time another training.
    """
    if device == "cuda":
        gc.collect()  # what else this process has trained must not be freed meanwhile
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


def peaks(
    script: str, options: Any, arguments: Sequence[str], arms: Iterable[str], measure: Callable[[str], Any]
) -> dict[str, Any]:
    """What `measure` says of each arm, one after the other; on CPU each in a process of its own, unless it is tiny.

    Args:
        script: the benchmark's own path, which takes `--measure-memory ARM` and prints what `measure` gives.
        options: with `device`, `size` and `no_memory`; a GPU's allocator counts exactly also after something else.
        arguments: what the script is started with.
        arms: their names.
        measure: gives something that JSON can hold.
    """
    if options.no_memory:
        return {}
    if options.device == "cuda" or options.size == "tiny":
        gc.collect()  # what has been timed needs its memory no more
        return {arm: measure(arm) for arm in arms}
    return {arm: in_own_process(script, *arguments, "--measure-memory", arm) for arm in arms}


def keep_freed_memory(device: str) -> None:
    """On CPU start the script again with an allocator that keeps what is freed, as CUDA's does by itself.

    glibc gives memory back at the end of each pass and fetches it again in the next, a few per cent of a step that
    depend on which passes follow each other; all arms are alike in this.
    """
    kept = {
        "MALLOC_ARENA_MAX": "1",  # only the main arena holds pieces of any size
        "MALLOC_MMAP_THRESHOLD_": str(1 << 40),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    }
    if device == "cpu" and platform.libc_ver()[0] == "glibc" and not kept.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **kept})


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
