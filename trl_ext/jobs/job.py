"""One job and the files of its folder: what it is, what it printed, and what it came to."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_ext.errors import ConfigurationError

JOB, FINISHED, FAILED, LOG = "job.json", "finished.json", "failed.json", "log.txt"
"""What is asked for, with what it depends on; what it came to; how long the log was when its function failed; what it
printed, over all its attempts."""

SAID = "trl-ext: "
"""Before what a command says about itself."""
_RANK = re.compile(r"^\[rank\d+\]: ?")
"""What torchrun puts before the lines of a rank's traceback."""


@dataclass(frozen=True, eq=False)
class Job:
    """A function that runs in a process and a folder of its own.

    Args:
        name: For messages.
        folder: Of this job alone. The function may leave files there, and goes on from them when it is started again.
        function: A function of a module, which the process imports by its name. It gives what JSON keeps.
        arguments: Its keyword arguments; what JSON has no form for, as a path, becomes text.
        depends_on: What the result is a function of: a finished job is used again only where this is the same.
    """

    name: str
    folder: Path
    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    depends_on: Mapping[str, Any] = field(default_factory=dict)

    def outcome(self) -> Outcome | None:
        """What it came to, where it has finished."""
        content = _read(self.folder / FINISHED)
        return None if content is None else Outcome(self, result=content["result"], seconds=content["seconds"])

    def refuse_others(self) -> None:
        """Refuse a folder in which something else has finished; what was only begun goes on with what is asked for now.

        Raises:
            ConfigurationError: With the names of what differs.
        """
        there, here = _read(self.folder / JOB), _plain(self.depends_on)
        if there is None or there["depends_on"] == here or not (self.folder / FINISHED).is_file():
            return
        old = there["depends_on"]
        names = [name for name in {**old, **here} if old.get(name) != here.get(name)]
        raise ConfigurationError(
            f"{self.folder} was made with other settings ({', '.join(names)}); move it away, or choose another output"
        )

    def forget(self) -> None:
        """Remove the folder that an earlier job has made.

        Raises:
            ConfigurationError: It holds something else.
        """
        if self.folder.is_dir() and not (self.folder / JOB).is_file() and any(self.folder.iterdir()):
            raise ConfigurationError(f"{self.folder} is there, and no job has made it; choose another output")
        shutil.rmtree(self.folder, ignore_errors=True)

    def begin(self, environment: Mapping[str, str], threads: int | None) -> Path:
        """Write down what is asked for, for the process that does it; gives the file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        asked = {
            "function": f"{self.function.__module__}:{self.function.__qualname__}",
            "arguments": self.arguments,
            "environment": environment,
            "threads": threads,
            "depends_on": self.depends_on,
            "log_before": len(self._log()),  # bytes of earlier attempts
        }
        (self.folder / FAILED).unlink(missing_ok=True)
        write_json(self.folder / JOB, asked)
        return self.folder / JOB

    def failure(self, code: int) -> str:
        """Why the attempt failed, in one line of its log."""
        failed = _read(self.folder / FAILED) or {"log": None}  # what libraries print as the process ends comes after it
        log = self._log()[_read(self.folder / JOB)["log_before"] : failed["log"]].decode(errors="replace")
        lines = [_RANK.sub("", line) for line in log.splitlines() if line.strip()] or ["it printed nothing"]
        if code < 0:
            how, why = f"was killed by signal {-code}", lines[-1]
        else:
            how, why = f"ended with exit code {code}", _error(lines) or lines[-1]
        return f"{self.name} {how}: {why.strip().removeprefix(SAID)} ({self.folder / LOG})"

    def _log(self) -> bytes:
        return (self.folder / LOG).read_bytes() if (self.folder / LOG).is_file() else b""


@dataclass(frozen=True)
class Outcome:
    """What a job came to."""

    job: Job
    result: Any = None
    """What the function gave."""
    seconds: float = 0.0
    """The time that the function took, in the attempt that finished."""
    error: str = ""
    """Why there is no result, in one line."""


def write_json(path: Path, content: Any) -> None:
    """Write a file in one move: it is there as a whole, or as it was."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(json.dumps(content, indent=1, default=str) + "\n")
    os.replace(unfinished, path)


def _error(lines: Iterable[str]) -> str | None:
    """That of the last traceback, or what a command has said after it: it may have been a process of its own."""
    error, inside = None, False
    for line in lines:
        if line.startswith("Traceback ("):
            inside = True
        elif line.startswith(SAID) or (inside and not line[0].isspace()):
            error, inside = line, False
    return error


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def _plain(value: Any) -> Any:
    """A value as JSON gives it back: a tuple is a list, a path is text."""
    return json.loads(json.dumps(value, default=str))
