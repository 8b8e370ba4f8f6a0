"""How far a probe is: a bar on a terminal, and a line now and then where the output goes to a file."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import TaskID

_SECONDS = 30.0


class Report:
    """Shows the progress of tasks, one after the other, on standard error; use as a context."""

    def __init__(self, seconds: float = _SECONDS) -> None:
        self._bar = None
        self._seconds = seconds
        self._task: TaskID | None = None
        self._name, self._total, self._last = "", 0, time.monotonic()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True))

    def start(self, name: str, total: int) -> None:
        """Begin a task of so many steps."""
        self._name, self._total = name, total
        if self._bar is not None:
            self._task = self._bar.add_task(name, total=total)

    def update(self, done: int) -> None:
        """Say how many steps of the task are done."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done)
        elif time.monotonic() - self._last >= self._seconds:
            self._last = time.monotonic()
            print(f"{self._name}: {done} of {self._total}", file=sys.stderr, flush=True)

    def __enter__(self) -> Report:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
