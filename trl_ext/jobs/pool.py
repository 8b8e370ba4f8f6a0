"""Running jobs: which is started when, and what comes back."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from trl_ext.jobs.job import Job, Outcome

Chain = Sequence[Job]
"""Jobs that follow one another, each on what the one before left."""


class Pool(AbstractContextManager["Pool"]):
    """Runs jobs, as a context; when it is left, or this process ends in whatever way, the jobs that run are killed.

    Args:
        preload: Modules that every job wants, imported once.
    """

    def __init__(self, preload: Sequence[str] = ("trl_ext.trainers",)) -> None:
        self.preload = preload
        self._worker: subprocess.Popen[str] | None = None

    def run(
        self,
        chains: Iterable[Chain],
        *,
        at_once: int = 1,
        devices: Sequence[str] = (),
        threads: int | None = None,
        until: float | None = None,
    ) -> Iterator[Outcome]:
        """Run chains of jobs, those first that come first.

        When a job fails, the rest of its chain is left out, and the others go on.

        Args:
            chains: The jobs.
            at_once: How many run at a time.
            devices: Accelerators, as CUDA_VISIBLE_DEVICES numbers them, one for each job that runs at a time, in turn;
                with none, each job sees all.
            threads: Of torch, in each process; None leaves it as it is.
            until: Time of `time.monotonic` from which on no job is started; finished ones still come back.

        Yields:
            What each job came to, as they end; of one that had finished before, at once.

        Raises:
            ConfigurationError: In a folder something else has finished; before any job is started.
            RuntimeError: The process that starts the jobs has ended.
        """
        waiting = [list(chain) for chain in chains]
        for job in (job for chain in waiting for job in chain):
            job.refuse_others()
        running: dict[str, tuple[Job, list[Job], int]] = {}
        slots = list(range(at_once))
        while waiting or running:
            while waiting and slots:
                job, *rest = waiting.pop(0)
                known = job.outcome()
                if known is not None:
                    yield known
                    if rest:
                        waiting.insert(0, rest)
                elif until is None or time.monotonic() < until:
                    slot = slots.pop(0)
                    visible = {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} if devices else {}
                    path = str(job.begin(visible, threads).absolute())
                    running[path] = job, rest, slot
                    print(path, file=self._started().stdin, flush=True)
            if not running:
                continue
            ended = self._next_ended()
            job, rest, slot = running.pop(ended["job"])
            slots.append(slot)
            outcome = job.outcome() if ended["code"] == 0 else None
            yield outcome or Outcome(job, error=job.failure(ended["code"]))
            if outcome is not None and rest:
                waiting.insert(0, rest)

    def _started(self) -> subprocess.Popen[str]:
        if self._worker is None:
            command = [sys.executable, "-m", "trl_ext.jobs.worker", *self.preload]
            self._worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self._worker

    def _next_ended(self) -> dict[str, Any]:
        worker = self._started()
        reply = worker.stdout.readline()  # type: ignore[union-attr]
        if not reply:
            raise RuntimeError(f"the process that starts jobs has ended with exit code {worker.wait()}")
        return dict(json.loads(reply))

    def __exit__(self, *error: object) -> None:
        if self._worker is not None:
            self._worker.stdin.close()  # type: ignore[union-attr]
            self._worker.wait()
            self._worker.stdout.close()  # type: ignore[union-attr]
