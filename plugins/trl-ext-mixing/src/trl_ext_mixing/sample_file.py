"""A file of samples: what they belong to in its first line, then a line a sample."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from trl_ext.errors import ConfigurationError

try:
    import fcntl
except ImportError:  # Windows: two runs on one file are the user's to avoid
    fcntl = None  # type: ignore[assignment]

_FREE = ("solved_at",)
"""Settings that decide no sample: a file made with another value is gone on with."""


class SampleFile:
    """Samples by (problem, sample), in a file that one run at a time appends to. An unfinished last line is taken away.

    Args:
        path: the file.
        header: what the samples belong to: groups of values (`settings`, `data`, `weights`) that JSON keeps.

    Raises:
        ConfigurationError: it cannot be written; another run has it; it is no file of samples, which is then left as
            it was; it holds samples of other settings, data or weights; or a line of it is damaged or there twice.
    """

    def __init__(self, path: Path, header: Mapping[str, Mapping[str, Any]]) -> None:
        self.path = path
        self.header = json.loads(json.dumps(header))  # as it will be read back: a tuple is a list
        self.samples: dict[tuple[int, int], dict[str, Any]] = {}
        """What is there: reward, tokens and whether it was cut off; completions stay in the file."""
        self._new = False
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file = path.open("a+b")
        except OSError as error:
            raise ConfigurationError(f"--output {path} cannot be written: {error.strerror}") from None
        try:
            self._lock()
            self._read(self.header)
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(
                f"another run is writing to {self.path}; wait for it, or choose another --output"
            ) from None
        except OSError:
            pass  # some network file systems have no locks; going on without is better than not at all

    def _read(self, header: dict[str, Any]) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if not lines and _is_start(content, header):
            self._file.truncate(0)
            self._new = True  # the header goes in with the first samples: a run that fails before leaves nothing
            return
        there = _parse(lines[0]) if lines else None
        if there is None or not isinstance(there.get("settings"), dict):
            raise ConfigurationError(f"{self.path} is not a file of samples; choose another --output")
        _refuse_others(self.path, there, header)
        for number, text in enumerate(lines[1:], start=2):
            line = _parse(text)
            if line is None or not {"problem", "sample", "reward"} <= line.keys():
                raise ConfigurationError(f"{self.path}: line {number} is not a sample; delete the line, and run again")
            if (line["problem"], line["sample"]) in self.samples:
                raise ConfigurationError(
                    f"{self.path}: line {number} has sample {line['sample']} of problem {line['problem']} again; "
                    "delete one of the two"
                )
            self._keep(line)
        if len(whole) < len(content):
            self._file.truncate(len(whole))

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Keep samples: once this returns, they are on disk."""
        new = [dict(line) for line in lines]
        self._write([self.header, *new] if self._new else new)
        self._new = False
        for line in new:
            self._keep(line)

    def _keep(self, line: Mapping[str, Any]) -> None:
        self.samples[line["problem"], line["sample"]] = {name: line.get(name) for name in ("reward", "tokens", "cut")}

    def _write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        self._file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> SampleFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()  # and with it goes the lock


def _is_start(content: bytes, header: Mapping[str, Any]) -> bool:
    """Whether a file without a whole line is empty, or the beginning of a header that a killed run left."""
    return (json.dumps(header) + "\n").encode().startswith(content)


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def _refuse_others(path: Path, there: Mapping[str, Any], header: Mapping[str, Mapping[str, Any]]) -> None:
    differing = []
    for group, values in header.items():
        old = there.get(group) or {}
        for name in dict.fromkeys((*values, *old)):
            if name not in _FREE and (name not in values or name not in old or old[name] != values[name]):
                label = name if group == "settings" else f"{group}: {name}"
                differing.append(f"{label} ({old.get(name, 'nothing')!r} there, {values.get(name, 'nothing')!r} here)")
    if not differing:
        return
    hint = " Batches decide which random numbers a sample gets." if any("batch_size" in d for d in differing) else ""
    raise ConfigurationError(
        f"{path} holds samples of other {' and '.join(_groups(differing))}: {', '.join(differing)}.{hint} Run with the "
        "values there to go on with it, choose another --output, or delete it"
    )


def _groups(differing: Iterable[str]) -> list[str]:
    names = (text.partition(": ")[0] if text.startswith(("data: ", "weights: ")) else "settings" for text in differing)
    return list(dict.fromkeys(names))
