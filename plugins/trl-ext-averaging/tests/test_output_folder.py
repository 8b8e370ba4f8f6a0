"""Outputs replace their own kind and nothing else, and what an interrupted run leaves is cleared away or named."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from on_disk import average, save, weights
from trl_ext_averaging.offline.output_folder import output_folder, sign

from trl_ext.errors import ConfigurationError


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [save(root / name, seed) for seed, name in enumerate("ab")]


def write(output: Path, content: str, overwrite: bool = False, inputs: tuple[Path, ...] = ()) -> None:
    with output_folder(output, overwrite, inputs) as folder:
        (folder / "sub").mkdir()
        (folder / "sub/file").write_text(content)
        sign(folder, {"method": "mean"})


def contents(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}


def refused(root: Path, output: Path, message: str, inputs: tuple[Path, ...] = ()) -> None:
    """Writing is refused, with or without overwriting, and changes nothing below `root`."""
    before = contents(root)
    with pytest.raises(ConfigurationError, match=message) as caught:
        write(output, "new", overwrite=True, inputs=inputs)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigurationError):
        write(output, "new", inputs=inputs)
    assert contents(root) == before


def test_an_earlier_output_is_replaced_where_asked_and_signed(tmp_path):
    write(tmp_path / "out", "old")
    with pytest.raises(ConfigurationError, match="choose another --output or add --overwrite"):
        write(tmp_path / "out", "new")
    write(tmp_path / "out", "new", overwrite=True)
    found = contents(tmp_path)
    assert found.keys() == {"out/sub/file", "out/averaging.json"}
    assert found["out/sub/file"] == "new"
    assert json.loads(found["out/averaging.json"]) == {"method": "mean", "files": ["sub/file", "averaging.json"]}


def test_a_failure_keeps_the_earlier_output(tmp_path):
    write(tmp_path / "out", "old")
    before = contents(tmp_path)
    with pytest.raises(ZeroDivisionError), output_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "half").write_text(str(1 / 0))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("signature", [None, "{", "[]", '{"files": 3}', '{"method": "mean"}'])
def test_a_foreign_folder_is_never_replaced(tmp_path, signature):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter").write_text("years of work")
    if signature is not None:
        (folder / "averaging.json").write_text(signature)
    refused(tmp_path, folder, "is no output of trl-ext average|holds chapter")


def test_an_earlier_output_with_something_of_the_users_in_it_is_never_replaced(tmp_path):
    write(tmp_path / "out", "old")
    (tmp_path / "out/checkpoint-5").mkdir()
    (tmp_path / "out/checkpoint-5/model").write_text("trained from it")
    refused(tmp_path, tmp_path / "out", "holds checkpoint-5/model, which trl-ext average did not write")


def test_an_input_is_never_deleted(tmp_path, monkeypatch):
    write(tmp_path / "out", "old")
    for inputs in [(tmp_path / "out",), (tmp_path / "other", tmp_path / "out/sub")]:
        refused(tmp_path, tmp_path / "out", "would delete the input", inputs)
    (tmp_path / "link").symlink_to(tmp_path / "out/sub")
    refused(tmp_path, tmp_path / "out", "would delete the input", (tmp_path / "link",))
    monkeypatch.chdir(tmp_path / "out/sub")
    refused(tmp_path, Path(".."), "would delete the input", (Path("file"),))


def test_the_command_keeps_the_parent_of_an_input_and_a_foreign_folder(pair, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").write_text("keep")
    for output in (pair[0].parent, pair[0], tmp_path / "mine"):
        with pytest.raises(ConfigurationError, match=r"would delete the input|is no output"):
            average(*pair, "-o", output, "--overwrite")
    assert (tmp_path / "mine/notes").read_text() == "keep"
    assert weights(pair[0]).keys() == weights(pair[1]).keys()


def test_files_and_symbolic_links_are_no_outputs(tmp_path):
    write(tmp_path / "real", "old")
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    refused(tmp_path, tmp_path / "file", "is a file")
    refused(tmp_path, tmp_path / "link", "is a symbolic link to .*real; name a folder")
    refused(tmp_path, tmp_path / "dangling", "is a symbolic link to .*nowhere")


# Leftovers.


def leave(root: Path, **writer: object) -> Path:
    left = root / ".out.incomplete"
    left.mkdir()
    (left / "half").write_text("written")
    if writer:
        (left / "writer.json").write_text(json.dumps({"host": socket.gethostname(), **writer}))
    return left


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    leave(tmp_path, process=gone.pid)
    write(tmp_path / "out", "new")
    (tmp_path / ".more.incomplete").mkdir()  # killed before its first file
    write(tmp_path / "more", "new")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "more"}


def test_what_another_process_is_writing_is_left_alone(tmp_path):
    leave(tmp_path, process=os.getpid())
    refused(tmp_path, tmp_path / "out", f"is being written by process {os.getpid()}")


def test_what_another_host_began_is_for_the_user_to_decide(tmp_path):
    leave(tmp_path, host="elsewhere", process=1)
    refused(tmp_path, tmp_path / "out", "was begun by process 1 on elsewhere; remove it if that is gone")


def test_what_looks_like_a_leftover_and_is_none_is_left_alone(tmp_path):
    leave(tmp_path)
    refused(tmp_path, tmp_path / "out", "was not left by trl-ext average; remove it")


def test_an_output_that_was_set_aside_is_for_the_user_to_decide(tmp_path):
    write(tmp_path / "out", "old")
    (tmp_path / "out").rename(tmp_path / ".out.old")
    refused(tmp_path, tmp_path / "out", r"\.out\.old is what an interrupted run was replacing; rename it to out")
    (tmp_path / ".out.old").rename(tmp_path / "out")  # the advice
    write(tmp_path / "out", "new", overwrite=True)
    assert contents(tmp_path)["out/sub/file"] == "new"
