"""A file of finished work that an interrupted run continues from: what it belongs to in its first line, then lines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from trl_ext.errors import ConfigurationError
from trl_ext_probing.ranks import from_first, is_first

try:
    import fcntl
except ImportError:  # Windows: two runs on one file are the user's to avoid
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
Line = dict[str, Any]


class Journal:
    """Appends lines, and hands back those of an earlier run. One run at a time has the file.

    On several processes the first one has the file, and all have the lines; they open it together.

    The first line goes in with the first work: a run that fails before leaves nothing that another one would have to
    agree with. A last line that a killed run did not finish is taken away.

    Args:
        path: The file.
        about: What the work depends on, in groups (`settings`, `data`, `weights`) of values that JSON keeps.
        overwrite: Begin anew where it holds other work.

    Raises:
        ConfigurationError: It cannot be written; another run has it; it is no journal, which is then left as it was; it
            belongs to other settings, data or weights, each of which the message names; or a line is damaged.
    """

    def __init__(self, path: Path, about: Mapping[str, Mapping[str, Any]], overwrite: bool = False) -> None:
        self.path = path
        self.about = json.loads(json.dumps(about))  # as it will be read back: a tuple is a list
        self.lines: list[Line] = []
        """What is done, in order."""
        self._new = False
        if is_first():
            self._open(overwrite)
        self.lines = from_first(lambda: self.lines)

    def _open(self, overwrite: bool) -> None:
        self._made = _missing_folders(self.path.parent)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
        except OSError as error:
            raise ConfigurationError(f"--output: {self.path} cannot be written: {error.strerror}") from None
        try:
            self._lock()
            self._read(overwrite)
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

    def _read(self, overwrite: bool) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.splitlines()
        there = _parse(lines[0]) if lines else None
        foreign = there is None or there.get("journal") != FORMAT or not isinstance(there.get("about"), dict)
        if foreign if lines else not _is_start(content):
            raise ConfigurationError(f"{self.path} is not a journal of a probe; choose another --output")
        if there is None or overwrite:
            self._file.truncate(0)
            self._new = True
            return
        self._refuse_others(there["about"])
        for number, text in enumerate(lines[1:], start=2):
            line = _parse(text)
            if line is None:
                raise ConfigurationError(f"{self.path}: line {number} is damaged; delete the line, and run again")
            self.lines.append(line)
        if len(whole) < len(content):
            self._file.truncate(len(whole))

    def _refuse_others(self, there: Mapping[str, Mapping[str, Any]]) -> None:
        differing = []
        for group in dict.fromkeys((*self.about, *there)):
            old, new = there.get(group, {}), self.about.get(group, {})
            for name in dict.fromkeys((*new, *old)):
                if old.get(name) != new.get(name) or (name in old) != (name in new):
                    label = name if group == "settings" else f"{group}: {name}"
                    values = (f"{side[name]!r}" if name in side else "nothing" for side in (old, new))
                    differing.append(f"{label} ({{}} there, {{}} here)".format(*values))
        if differing:
            raise ConfigurationError(
                f"{self.path} holds work with other settings: {', '.join(differing)}. Run with the values there to "
                "go on with it, choose another --output, or begin anew with --overwrite"
            )

    def append(self, *lines: Mapping[str, Any]) -> None:
        """Keep finished work, the same on all processes: once this returns, it is on disk."""
        self.lines += map(dict, lines)
        if is_first():
            self._write(lines)

    def _write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        self._file.write((_header(self.about) if self._new else b"") + content)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._new = False

    def damaged(self, number: int, why: str) -> ConfigurationError:
        """The error of a line that says something impossible; `number` counts `lines` from 0."""
        return ConfigurationError(f"{self.path}: line {number + 2} {why}; delete the line, and run again")

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not is_first():
            return
        if self._new:  # nothing was done: leave things as they were
            self.path.unlink()
            for folder in self._made:
                if not any(folder.iterdir()):
                    folder.rmdir()
        self._file.close()  # and with it goes the lock


def _header(about: Mapping[str, Any]) -> bytes:
    return json.dumps({"journal": FORMAT, "about": about}).encode() + b"\n"


def _is_start(content: bytes) -> bool:
    """Whether a file without a whole line is empty, or the beginning of a header that a killed run left."""
    start = b'{"journal": %d, "about": ' % FORMAT
    return content.startswith(start) or start.startswith(content)


def _missing_folders(folder: Path) -> list[Path]:
    """The folders that have to be made for a folder to be there, the innermost first."""
    return [part for part in (folder, *folder.parents) if not part.exists()]


def _parse(text: bytes) -> Line | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None
