"""Running jobs: which is started when, and what comes back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence

from trl_ext.jobs.job import Job, Outcome

Chain = Sequence[Job]
"""Jobs that follow one another, each on what the one before left."""


def run_jobs(
    chains: Iterable[Chain],
    *,
    at_once: int = 1,
    devices: Sequence[str] = (),
    threads: int | None = None,
    until: float | None = None,
    preload: Sequence[str] = ("trl_ext.trainers",),
) -> Iterator[Outcome]:
    """Run chains of jobs, those first that come first.

    When a job fails, the rest of its chain is left out, and the others go on. When the iterator is closed, or this
    process ends in whatever way, the jobs that run are killed.

    Args:
        chains: The jobs.
        at_once: How many run at a time.
        devices: Accelerators, as CUDA_VISIBLE_DEVICES numbers them, one for each job that runs at a time, in turn;
            with none, each job sees all.
        threads: Of torch, in each process; None leaves it as it is.
        until: Time of `time.monotonic` from which on no job is started; finished ones still come back.
        preload: Modules to import before the first job.

    Yields:
        What each job came to, as they end; of one that had finished before, at once.

    Raises:
        ConfigurationError: A folder holds a job that depends on something else; before any is started.
        RuntimeError: The process that starts the jobs has ended.
    """
    waiting = [list(chain) for chain in chains]
    for job in (job for chain in waiting for job in chain):
        job.refuse_others()
    worker: subprocess.Popen[str] | None = None
    running: dict[str, tuple[Job, list[Job], int]] = {}
    slots = list(range(at_once))
    try:
        while waiting or running:
            while waiting and slots:
                job, *rest = waiting.pop(0)
                known = job.outcome()
                if known is not None:
                    yield known
                    if rest:
                        waiting.insert(0, rest)
                    continue
                if until is not None and time.monotonic() >= until:
                    continue
                if worker is None:
                    worker = _start(preload)
                slot = slots.pop(0)
                visible = {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} if devices else {}
                path = str(job.begin(visible, threads).absolute())
                running[path] = job, rest, slot
                print(path, file=worker.stdin, flush=True)
            if worker is None or not running:
                continue
            reply = worker.stdout.readline()  # type: ignore[union-attr]
            if not reply:
                raise RuntimeError(f"the process that starts jobs has ended with exit code {worker.wait()}")
            ended = json.loads(reply)
            job, rest, slot = running.pop(ended["job"])
            slots.append(slot)
            outcome = job.outcome() if ended["code"] == 0 else None
            yield outcome or Outcome(job, error=job.failure(ended["code"]))
            if outcome is not None and rest:
                waiting.insert(0, rest)
    finally:
        if worker is not None:
            worker.stdin.close()  # type: ignore[union-attr]
            worker.wait()


def _start(preload: Sequence[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "trl_ext.jobs.worker", *preload]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
