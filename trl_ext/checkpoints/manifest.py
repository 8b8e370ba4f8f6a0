"""The manifest of a checkpoint: which run wrote it, and every file of it with its size and checksum.

It is the last file to be written, after `trainer_state.json` and before older checkpoints are deleted. So a checkpoint
with a manifest is complete, and one of two checkpoints always is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from trl_ext.checkpoints.files import Gather, checksum, checksums, read_json, require, write_json
from trl_ext.errors import CheckpointError

FOLDER = "trl_ext"
NAME = f"{FOLDER}/manifest.json"
FORMAT = 2
_SHAPE = {"checksum": str, "world_size": int, "plugins": list, "run": dict, "files": dict}


def list_files(checkpoint: Path, gather: Gather, rank: int) -> dict[str, dict[str, Any]]:
    """Size and checksum of every file that a checkpoint has by now, but for the manifest. Collective."""
    gather(None)  # every rank has written its files
    names = _names(checkpoint)
    found = checksums(checkpoint, names, rank, gather)
    return {name: _entry(checkpoint / name, found[name]) for name in names if found.get(name) is not None}


def write_manifest(checkpoint: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, or replace it, with the files that have come since they were listed."""
    files = dict(manifest["files"])
    for name in _names(checkpoint):
        if name not in files:
            files[name] = _entry(checkpoint / name, checksum(checkpoint / name))
    content = {"format": FORMAT, **manifest, "files": files}
    write_json(checkpoint / NAME, content | {"checksum": _own_checksum(content)})


def read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint, or None where trl_ext wrote nothing.

    Raises:
        CheckpointError: it is missing beside other files of trl_ext, corrupt, or of another format.
    """
    path = checkpoint / NAME
    if not (checkpoint / FOLDER).is_dir():
        return None
    manifest = read_json(path, {"format": int})
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {manifest['format']}, this version of trl_ext reads {FORMAT}")
    require(path, manifest, _SHAPE)
    if manifest.pop("checksum") != _own_checksum(manifest):
        raise CheckpointError(f"{path} is corrupt: its content differs from its own checksum")
    return manifest


def wrong_size(checkpoint: Path, manifest: dict[str, Any]) -> str | None:
    """Which file is missing or has another size, in words; None if there is none."""
    for name, entry in manifest["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['size']}"
    return None


def wrong_content(
    checkpoint: Path, manifest: dict[str, Any], rank: int, gather: Gather, plugin_state: bool = True
) -> str | None:
    """Which files have another checksum, in words; None if there is none. Collective.

    Without `plugin_state`, the files of single plugins are left out.
    """
    files = {n: e for n, e in manifest["files"].items() if plugin_state or not _of_a_plugin(n)}
    found = checksums(checkpoint, files, rank, gather)
    wrong = [name for name, entry in files.items() if found[name] != entry["xxh3_128"]]
    return f"{', '.join(wrong)} is corrupt: the checksum in {NAME} is another" if wrong else None


def _of_a_plugin(name: str) -> bool:
    return name.startswith(f"{FOLDER}/") and name.count("/") > 1


def _names(checkpoint: Path) -> list[str]:
    names = [path.relative_to(checkpoint).as_posix() for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    return [name for name in names if name not in (NAME, f"{NAME}.tmp")]


def _entry(path: Path, found: str | None) -> dict[str, Any]:
    return {"size": path.stat().st_size, "xxh3_128": found}


def _own_checksum(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()
