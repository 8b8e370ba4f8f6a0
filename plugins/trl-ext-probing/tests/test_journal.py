"""The journal: what it refuses, what it leaves alone, and what it continues."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from trl_ext_probing.journal import Journal

from trl_ext.errors import ConfigurationError

ABOUT: dict[str, Any] = {
    "settings": {"temperature": 1.0, "limit": None},
    "data": {"rows": 2, "digest": "d0"},
    "weights": {"model": "content 00"},
}
LINES = ({"row": 0, "sample": 0}, {"row": 0, "sample": 1})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with Journal(tmp_path / "s.jsonl", ABOUT) as journal:
        journal.append(*LINES)
    return tmp_path / "s.jsonl"


def changed(group: str, **values: Any) -> dict[str, Any]:
    return {**ABOUT, group: {**ABOUT[group], **values}}


def test_lines_come_back_and_an_unfinished_one_is_taken_away(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"row": 1, "samp')
    with Journal(path, ABOUT) as journal:
        assert journal.lines == list(LINES)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "content",
    [
        b"notes without an end",
        b"a table\nof something",
        b'{"epoch": 1}\n{"epoch": 2',
        b'{"journal": 1, "about": "mine"}\n',
        b"[1, 2]\n",
        b"\n",
        b"\xff\xfe binary\n half",
    ],
)
def test_a_file_of_something_else_is_left_as_it_was(tmp_path: Path, content: bytes, overwrite: bool) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match="not a journal of a probe"):
        Journal(path, ABOUT, overwrite)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"", b'{"jour', b'{"journal": 1, "about": {"set'])
def test_a_file_whose_header_did_not_get_written_begins_anew(path: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "new.jsonl").write_bytes(content)
    with Journal(tmp_path / "new.jsonl", ABOUT) as journal:
        journal.append(*LINES)
    assert (tmp_path / "new.jsonl").read_bytes() == path.read_bytes()


def test_a_run_that_fails_before_its_first_work_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(LookupError), Journal(tmp_path / "new" / "folder" / "s.jsonl", ABOUT):
        raise LookupError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("about", "message"),
    [
        (changed("settings", temperature=0.5), r"other settings: temperature \(1\.0 there, 0\.5 here\)\. Run with"),
        (changed("settings", new=1), r"new \(nothing there, 1 here\)"),
        (changed("settings", temperature=0.5, limit=3), r"temperature \(.*\), limit \(None there, 3 here\)"),
        (changed("data", digest="d1"), r"data: digest \('d0' there, 'd1' here\)"),
        (changed("weights", base="content 02"), r"weights: base \(nothing there, 'content 02' here\)"),
        ({"settings": ABOUT["settings"]}, r"data: rows \(2 there, nothing here\).*weights: model"),
    ],
)
def test_other_work_is_named_and_goes_only_on_request(path: Path, about: dict[str, Any], message: str) -> None:
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match=message) as caught:
        Journal(path, about)
    assert "begin anew with --overwrite" in str(caught.value)
    assert path.read_bytes() == before
    with Journal(path, about, overwrite=True) as journal:
        assert journal.lines == []
        journal.append(LINES[0])
    with Journal(path, about) as journal:
        assert journal.lines == [LINES[0]]


@pytest.mark.parametrize("damage", ["{broken", "[1]"])
def test_a_damaged_line_is_named(path: Path, damage: str) -> None:
    with path.open("a") as file:
        file.write(damage + "\n" + '{"row": 1}\n')
    with pytest.raises(ConfigurationError, match="line 4 is damaged; delete the line"):
        Journal(path, ABOUT)


def test_two_processes_do_not_write_to_one_file(path: Path) -> None:
    attempt = (
        "from pathlib import Path\nfrom trl_ext_probing.journal import Journal\n"
        f"Journal(Path({str(path)!r}), {ABOUT!r})"
    )
    with Journal(path, ABOUT):
        done = subprocess.run([sys.executable, "-c", attempt], capture_output=True, text=True, timeout=100)
        assert "another run is writing to" in done.stderr
    done = subprocess.run([sys.executable, "-c", attempt], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_a_folder_is_no_journal(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="--output"):
        Journal(tmp_path, ABOUT)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"--output: .* cannot be written"):
        Journal(tmp_path / "file" / "journal.jsonl", ABOUT)
