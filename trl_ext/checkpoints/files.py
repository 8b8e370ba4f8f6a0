"""The files of a checkpoint: JSON of a known shape, and checksums, whose work the ranks share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from trl_ext.errors import CheckpointError

Gather = Callable[[Any], list[Any]]
"""Gives every rank's object, on every rank."""
_BLOCK = 1 << 20
"""Bytes that are read and hashed at a time: they are still in the processor's cache when they are hashed."""


def read_json(path: Path, shape: Mapping[str, type]) -> dict[str, Any]:
    """Read a JSON object that holds at least the keys of `shape`, with values of these types.

    Raises:
        CheckpointError: the file is missing, no JSON, too deeply nested, or of another shape. It names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} is missing or cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is corrupt: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is corrupt: it holds a JSON {type(content).__name__} instead of an object")
    require(path, content, shape)
    return content


def require(path: Path, content: Mapping[str, Any], shape: Mapping[str, type]) -> None:
    """Check that what was read from a file has the keys of `shape`, with values of these types.

    Raises:
        CheckpointError: it has not.
    """
    for key, kind in shape.items():
        if type(content.get(key)) is not kind:
            raise CheckpointError(f"{path} is corrupt: its {key!r} is not of type {kind.__name__}")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that a process killed on the way leaves no part of it under its name."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def checksum(path: Path) -> str:
    """XXH3 with 128 bits of a file's content. It finds accidents; it is no protection against an attacker."""
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def checksums(folder: Path, names: Iterable[str], rank: int, gather: Gather) -> dict[str, str | None]:
    """The checksums of files below a folder, None for one that is not there. Collective: each rank reads its share.

    Args:
        folder: the checkpoint's folder.
        names: paths below it. Those of rank 0 count: the others may not see all of them yet.
        rank: of this process.
        gather: gives every rank's object, on every rank; the number of its results is the number of ranks.
    """
    everywhere = gather(list(names))
    share = everywhere[0][rank :: len(everywhere)]
    with ThreadPoolExecutor() as threads:  # hashing and reading both release the interpreter's lock
        mine = dict(zip(share, threads.map(lambda name: _checksum_if_there(folder / name), share), strict=True))
    return {name: value for part in gather(mine) for name, value in part.items()}


def _checksum_if_there(path: Path) -> str | None:
    try:
        return checksum(path)
    except OSError:  # told apart from another checksum by the caller, who names the file
        return None
