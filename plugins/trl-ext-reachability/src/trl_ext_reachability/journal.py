"""A file of finished work, one JSON line each, that an interrupted run continues from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from trl_ext.errors import ConfigurationError


class Journal:
    """Appends lines, and hands back those of an earlier run. A line that was cut off is taken away.

    Args:
        path: the file.
        settings: what the work depends on; the first line.

    Raises:
        ConfigurationError: the file was written with other settings; the message names them.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.read_bytes() if path.exists() else b""
        whole = whole[: whole.rfind(b"\n") + 1]
        lines = [json.loads(line) for line in whole.splitlines()]
        # Through JSON, as the file's: tuples become lists.
        header = json.loads(json.dumps({"settings": settings}))
        if lines and lines[0] != header:
            old, new = lines[0].get("settings", {}), header["settings"]
            changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
            raise ConfigurationError(
                f"{path} holds a measurement with other settings ({', '.join(changed)}); choose another --output, or "
                "delete it"
            )
        self.lines: list[dict[str, Any]] = lines[1:]
        """What is done, in order."""
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._file.truncate(len(whole))
        self._file.seek(len(whole))
        if not lines:
            self._write(header)

    def append(self, line: Mapping[str, Any]) -> None:
        """Keep finished work: once this returns, it is on disk."""
        self._write(line)
        self.lines.append(dict(line))

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
