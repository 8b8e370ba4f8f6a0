"""A probe that is killed in the middle of its work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from trl_ext_probing.journal import Journal


class Killed(BaseException):
    """Nothing may catch it."""


@contextmanager
def killed_after(writes: int) -> Iterator[None]:
    """A context that a probe does not survive: it is killed when it has written so many times to its journals."""
    append, count = Journal.append, 0

    def failing(self: Journal, *lines: Any) -> None:
        nonlocal count
        if count == writes:
            raise Killed
        append(self, *lines)
        count += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "append", failing)
        with pytest.raises(Killed):
            yield


def lines_of(journal: Path) -> list[dict[str, Any]]:
    """What a journal holds, without its header."""
    return [json.loads(line) for line in journal.read_text().splitlines()[1:]]


def results_of(folder: Path) -> dict[str, Any]:
    """What a probe found, without the command, which names the folder."""
    content = json.loads((folder / "results.json").read_text())
    del content["command"]
    return content  # type: ignore[no-any-return]


def same_results(one: Path, other: Path) -> None:
    """Both folders hold the same results and, in whatever order, the same journals."""
    assert results_of(one) == results_of(other)
    for name in ("rows.csv", "plot.png"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    journals = [path.name for path in one.glob("journal*")]
    assert journals
    for name in journals:
        assert sorted((one / name).read_text().splitlines()) == sorted((other / name).read_text().splitlines())
