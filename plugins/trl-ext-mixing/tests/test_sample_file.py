"""The file of samples: what it refuses, what it leaves alone, and what it continues."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from trl_ext_mixing.sample_file import SampleFile

from trl_ext.errors import ConfigurationError

HEADER: dict[str, Any] = {
    "settings": {"model": "m", "temperature": 1.0, "batch_size": 4, "solved_at": 1.0, "limit": None},
    "data": {"rows": 2, "digest": "d0"},
    "weights": {"model": "content 00"},
}


def line(problem: int, sample: int) -> dict[str, Any]:
    return {"problem": problem, "sample": sample, "reward": 1.0, "tokens": 3, "cut": False, "completion": "x"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with SampleFile(tmp_path / "s.jsonl", HEADER) as file:
        file.append([line(0, 0), line(0, 1)])
    return tmp_path / "s.jsonl"


def changed(group: str, **values: Any) -> dict[str, Any]:
    return {**HEADER, group: {**HEADER[group], **values}}


def test_samples_come_back_and_an_unfinished_line_is_taken_away(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"problem": 1, "samp')
    with SampleFile(path, HEADER) as file:
        assert list(file.samples) == [(0, 0), (0, 1)]
        assert file.samples[0, 1] == {"reward": 1.0, "tokens": 3, "cut": False}
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "content",
    [
        b"notes without an end",
        b"a table\nof something",
        b'{"epoch": 1}\n{"epoch": 2',
        b'{"settings": "mine"}\n',
        b"[1, 2]\n",
        b"\n",
        b"\xff\xfe binary\n half",
    ],
)
def test_a_file_of_something_else_is_left_as_it_was(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match="not a file of samples"):
        SampleFile(path, HEADER)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"", b'{"settings": {"mod'], ids=["empty", "cut within the header"])
def test_a_file_whose_header_did_not_get_written_begins_anew(path: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "new.jsonl").write_bytes(content)
    with SampleFile(tmp_path / "new.jsonl", HEADER) as file:
        file.append([line(0, 0), line(0, 1)])
    assert (tmp_path / "new.jsonl").read_bytes() == path.read_bytes()


def test_a_run_that_fails_before_its_first_samples_claims_nothing(tmp_path: Path) -> None:
    SampleFile(tmp_path / "s.jsonl", HEADER).__exit__(None, None, None)
    with SampleFile(tmp_path / "s.jsonl", changed("settings", temperature=0.5)) as file:
        assert not file.samples


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (changed("settings", temperature=0.5), r"other settings: temperature \(1\.0 there, 0\.5 here\)\. Run with"),
        (changed("settings", batch_size=8), r"batch_size \(4 there, 8 here\)\. Batches decide which random numbers"),
        (changed("settings", new=1), r"new \('nothing' there, 1 here\)"),
        (changed("data", digest="d1"), r"other data: data: digest \('d0' there, 'd1' here\)"),
        (changed("weights", model="content 01"), r"other weights: weights: model \('content 00' there"),
        (changed("weights", base="content 02"), r"weights: base \('nothing' there"),
    ],
)
def test_samples_of_something_else_are_not_gone_on_with(path: Path, header: dict[str, Any], message: str) -> None:
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match=message):
        SampleFile(path, header)
    assert path.read_bytes() == before


def test_a_file_that_says_nothing_of_data_and_weights_is_not_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "old.jsonl").write_text(json.dumps({"settings": HEADER["settings"]}) + "\n")
    with pytest.raises(ConfigurationError, match=r"other data and weights: .*weights: model \('nothing' there"):
        SampleFile(tmp_path / "old.jsonl", HEADER)


def test_what_only_judges_may_change(path: Path) -> None:
    with SampleFile(path, changed("settings", solved_at=0.5)) as file:
        assert len(file.samples) == 2


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (json.dumps(line(0, 1)), "line 4 has sample 1 of problem 0 again"),
        ("{broken", "line 4 is not a sample"),
        ('{"problem": 1}', "line 4 is not a sample"),
    ],
)
def test_a_damaged_file_is_refused_with_the_line(path: Path, extra: str, message: str) -> None:
    with path.open("a") as file:
        file.write(extra + "\n")
    with pytest.raises(ConfigurationError, match=message):
        SampleFile(path, HEADER)


def test_two_processes_do_not_write_to_one_file(path: Path) -> None:
    attempt = (
        "from pathlib import Path\nfrom trl_ext_mixing.sample_file import SampleFile\n"
        f"SampleFile(Path({str(path)!r}), {HEADER!r})"
    )
    with SampleFile(path, HEADER):
        done = subprocess.run([sys.executable, "-c", attempt], capture_output=True, text=True, timeout=100)
        assert "another run is writing to" in done.stderr
    done = subprocess.run([sys.executable, "-c", attempt], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_a_folder_is_no_output(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="--output"):
        SampleFile(tmp_path, HEADER)
