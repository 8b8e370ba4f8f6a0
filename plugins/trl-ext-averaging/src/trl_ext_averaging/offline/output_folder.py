"""Output folders that are there as a whole or not at all, and that take the place of nothing but an earlier output.

While it is written, an output lies in `.<name>.incomplete` beside its place, with a note of the process that writes it.
When it is complete, `averaging.json` lists its files, and only a folder whose files are all so listed is replaced.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trl_ext.errors import ConfigurationError

SIGNATURE = "averaging.json"
WRITER = "writer.json"


@contextmanager
def output_folder(output: Path, overwrite: bool = False, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """A folder to write into and to `sign`, which becomes `output` at the end and disappears on an exception.

    A process that is killed leaves only `.<name>.incomplete`, which the next run for the same output removes.

    Args:
        output: the folder to be.
        overwrite: whether an earlier output may be replaced.
        inputs: what is read meanwhile, and must not lie in the folder that is replaced.

    Raises:
        ConfigurationError: as `check_output`, or another process is writing this output.
    """
    output = Path(os.path.abspath(output))  # `resolve` would follow a symbolic link
    check_output(output, overwrite, inputs)
    staging = _claim(output)
    try:
        yield staging
        (staging / WRITER).unlink()
        _put_in_place(staging, output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def sign(folder: Path, provenance: Mapping[str, Any]) -> None:
    """Write where a complete output comes from, and which files it has, into `averaging.json`."""
    files = sorted(str(path.relative_to(folder)) for path in _files(folder) if path.name != WRITER)
    write_json(folder / SIGNATURE, {**provenance, "files": [*files, SIGNATURE]})


def check_output(output: Path, overwrite: bool, inputs: Iterable[Path]) -> None:
    """Refuse to write where something else is.

    Raises:
        ConfigurationError: `output` exists and is not to be replaced; is a symbolic link or a file; holds an input or
            anything that `trl-ext average` did not write; or an interrupted run has left something to decide.
    """
    output = Path(os.path.abspath(output))
    if output.is_symlink():
        raise ConfigurationError(f"{output} is a symbolic link to {output.readlink()}; name a folder as --output")
    if os.path.lexists(aside := _aside(output)):
        raise ConfigurationError(
            f"{aside} is what an interrupted run was replacing; rename it to {output.name} if that is missing, else "
            "remove it"
        )
    if not output.exists():
        return
    if not overwrite:
        raise ConfigurationError(f"{output} exists; choose another --output or add --overwrite")
    if not output.is_dir():
        raise ConfigurationError(f"{output} is a file; choose another --output")
    for path in inputs:
        if path.resolve().is_relative_to(output.resolve()):
            raise ConfigurationError(f"--overwrite would delete the input {path}; choose another --output")
    written = _signed_files(output)
    if written is None:
        raise ConfigurationError(
            f"{output} is no output of trl-ext average, and --overwrite replaces nothing else; choose another --output"
        )
    foreign = sorted(str(path.relative_to(output)) for path in _files(output))
    foreign = [name for name in foreign if name not in written]
    if foreign:
        raise ConfigurationError(
            f"{output} holds {foreign[0]}, which trl-ext average did not write and --overwrite would delete; move it, "
            "or choose another --output"
        )


def write_json(path: Path, content: Any) -> None:
    """Write JSON that is on the disk when this returns."""
    with path.open("w") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _put_in_place(staging: Path, output: Path) -> None:
    if not output.exists():
        staging.rename(output)
        return
    old = _aside(output)
    output.rename(old)
    try:
        staging.rename(output)
    except BaseException:
        old.rename(output)
        raise
    shutil.rmtree(old)


def _aside(output: Path) -> Path:
    return output.with_name(f".{output.name}.old")


def _claim(output: Path) -> Path:
    """Make the folder to write into, in place of one that a killed process has left."""
    staging = output.with_name(f".{output.name}.incomplete")
    if os.path.lexists(staging):
        _refuse_unless_abandoned(staging)
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    write_json(staging / WRITER, {"host": socket.gethostname(), "process": os.getpid()})
    return staging


def _refuse_unless_abandoned(staging: Path) -> None:
    try:
        writer = json.loads((staging / WRITER).read_text())
        host, process = str(writer["host"]), int(writer["process"])
    except (OSError, ValueError, KeyError, TypeError):
        if not staging.is_symlink() and staging.is_dir() and not any(staging.iterdir()):
            return  # killed before its first file
        raise ConfigurationError(
            f"{staging} is in the way and was not left by trl-ext average; remove it, or choose another --output"
        ) from None
    if host != socket.gethostname():
        raise ConfigurationError(
            f"{staging} was begun by process {process} on {host}; remove it if that is gone, or choose another --output"
        )
    if staging.is_symlink() or _lives(process):
        raise ConfigurationError(f"{staging} is being written by process {process}; choose another --output")


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _signed_files(folder: Path) -> set[str] | None:
    """The files that an earlier run lists as its own; None of any other folder."""
    try:
        return set(json.loads((folder / SIGNATURE).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
