"""How far a probe is: a bar on a terminal, and a line now and then where the output goes to a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from trl_ext_probing.ranks import is_first

_SECONDS = 30.0


def say(line: str) -> None:
    """Print one line about a probe itself, apart from its results."""
    print(line, file=sys.stderr, flush=True)


class Report:
    """Shows how far tasks are, one after the other, on standard error, with rate and time left; use as a context."""

    def __init__(self, seconds: float = _SECONDS) -> None:
        self._bar: Any = None
        self._seconds = seconds
        self._task: Any = None
        self._name, self._total, self._before = "", 0, 0
        self._start = self._last = time.monotonic()
        self._silent = not is_first()
        if sys.stderr.isatty() and not self._silent:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            rate = TextColumn("{task.fields[rate]}")
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))

    def start(self, name: str, total: int, done: int = 0) -> None:
        """Begin a task of so many steps, of which some may have been done before."""
        self._name, self._total, self._before = name, total, done
        self._start = self._last = time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task(name, total=total, completed=done, rate="")

    def update(self, done: int) -> None:
        """Say how many steps of the task are done."""
        now = time.monotonic()
        rate = (done - self._before) / max(now - self._start, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, rate=f"{rate:.3g}/s")
        elif now - self._last >= self._seconds and not self._silent:
            self._last = now
            left = f", {_clock((self._total - done) / rate)} left" if rate > 0 else ""
            say(f"{self._name}: {done} of {self._total}, {rate:.3g}/s{left}")

    def follow(self, name: str, total: int, progress: Iterator[int]) -> None:
        """Do a task that says again and again how many steps are done, beforehand too."""
        self.start(name, total, next(progress))
        for done in progress:
            self.update(done)

    def __enter__(self) -> Report:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
