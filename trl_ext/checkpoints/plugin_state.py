"""Plugin state in checkpoints: saved with checksums, verified before anything loads, and given back.

checkpoint-30/trl_ext/manifest.json                      written last, lists every file of the checkpoint
                      <plugin>/state.json                 JSON values and the state's version
                      <plugin>/state.safetensors          tensors; `state-00001.safetensors` a rank, if they differ
                      rank-00000.json, .safetensors       what the trainer itself keeps on each rank
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from trl_ext.errors import CheckpointError

FOLDER = "trl_ext"
FORMAT = 1
State = dict[str, Any]
"""Flat: names to tensors and JSON values."""


def save_state(
    checkpoint: Path,
    plugins: Iterable[Any],
    rank_state: State,
    *,
    rank: int,
    world_size: int,
    gather: Callable[[Any], list[Any]],
) -> None:
    """Write the plugins' and the trainer's state, then the manifest. Collective.

    Args:
        checkpoint: the checkpoint's folder, in which model, optimiser, scheduler and random states are already written.
        plugins: the active plugins (`ActivePlugin`).
        rank_state: what the trainer keeps on this rank.
        rank, world_size: of this process.
        gather: gives the list of every rank's object, on every rank.
    """
    folder = checkpoint / FOLDER
    records: dict[str, Any] = {}
    for plugin in plugins:
        if not hasattr(plugin.instance, "state_dict"):
            continue
        per_rank = bool(getattr(plugin.instance, "state_per_rank", False))
        if rank == 0 or per_rank:
            state = plugin.instance.state_dict()
            _write(folder / plugin.name, f"state-{rank:05d}" if per_rank else "state", state, plugin.name)
        records[plugin.name] = {
            "distribution": plugin.distribution,
            "distribution_version": plugin.version,
            "state_version": getattr(plugin.instance, "state_version", 1),
            "per_rank": per_rank,
        }
    _write(folder, f"rank-{rank:05d}", rank_state, "trainer")
    # Gathering is the barrier too: after it, every rank has written its part, and rank 0 knows all checksums.
    mine = [folder.joinpath(*parts) for parts in _written_by(records, rank)]
    checksums: dict[str, str] = {}
    for part in gather({str(p.relative_to(checkpoint)): _sha256(p) for p in mine}):
        checksums.update(part)
    if rank == 0:
        sizes = {
            str(p.relative_to(checkpoint)): p.stat().st_size
            for p in sorted(checkpoint.rglob("*"))
            if p.is_file() and p.name not in ("trainer_state.json", "manifest.json")
        }
        manifest = {
            "format": FORMAT,
            "world_size": world_size,
            "plugins": records,
            "sha256": checksums,
            "sizes": sizes,
        }
        temporary = folder / "manifest.json.tmp"
        temporary.write_text(json.dumps(manifest, indent=2, sort_keys=True))
        os.replace(temporary, folder / "manifest.json")
    gather(None)


def _written_by(records: Mapping[str, Any], rank: int) -> Iterable[tuple[str, ...]]:
    for name, record in records.items():
        if rank == 0 or record["per_rank"]:
            stem = f"state-{rank:05d}" if record["per_rank"] else "state"
            yield name, f"{stem}.json"
            yield name, f"{stem}.safetensors"
    yield (f"rank-{rank:05d}.json",)
    yield (f"rank-{rank:05d}.safetensors",)


def _write(folder: Path, stem: str, state: State, owner: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items() if isinstance(v, Tensor)}
    values = {k: v for k, v in state.items() if not isinstance(v, Tensor)}
    try:
        text = json.dumps(values, indent=2, sort_keys=True)
    except TypeError as error:
        raise CheckpointError(f"the state of '{owner}' holds what is neither tensor nor JSON: {error}") from error
    (folder / f"{stem}.json").write_text(text)
    # Shared storage would be refused by safetensors; a state may well hold views of one buffer.
    save_file({k: v.clone() for k, v in tensors.items()}, folder / f"{stem}.safetensors")


def read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint, or None where trl_ext wrote nothing.

    Raises:
        CheckpointError: unreadable, or of a later format.
    """
    path = checkpoint / FOLDER / "manifest.json"
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is corrupt: {error}") from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {manifest.get('format')}, this version of trl_ext reads {FORMAT}")
    return manifest


def verify_plugins(checkpoint: Path, plugins: Iterable[Any], world_size: int) -> None:
    """Check, before anything loads, that a checkpoint's plugin state fits the active plugins.

    Raises:
        CheckpointError: state that is missing, foreign, of another version or number of ranks, or corrupt.
    """
    manifest = read_manifest(checkpoint)
    reset = "; set reset_plugin_state=True to start the plugins afresh from this checkpoint's weights"
    stateful = {p.name: p for p in plugins if hasattr(p.instance, "load_state_dict")}
    saved = {} if manifest is None else manifest["plugins"]
    missing = sorted(set(stateful) - set(saved))
    if missing:
        raise CheckpointError(f"{checkpoint} holds no state for the active plugin(s) {', '.join(missing)}{reset}")
    foreign = sorted(set(saved) - set(stateful))
    if foreign:
        raise CheckpointError(
            f"{checkpoint} holds state of plugin(s) that are not active: {', '.join(foreign)}; add them to `plugins`, "
            f"or drop that state{reset}"
        )
    if manifest is None:
        return
    for name, plugin in stateful.items():
        version = getattr(plugin.instance, "state_version", 1)
        if saved[name]["state_version"] > version:
            raise CheckpointError(
                f"{checkpoint}: the state of plugin '{name}' has version {saved[name]['state_version']}, "
                f"plugin {plugin} reads up to {version}; upgrade its distribution{reset}"
            )
        if saved[name]["per_rank"] and manifest["world_size"] != world_size:
            raise CheckpointError(
                f"{checkpoint}: plugin '{name}' was saved in shards by {manifest['world_size']} ranks, "
                f"this run has {world_size}{reset}"
            )
    for relative, checksum in manifest["sha256"].items():
        path = checkpoint / relative
        if not path.is_file() or _sha256(path) != checksum:
            raise CheckpointError(f"{path} is missing or corrupt (its checksum differs from the manifest){reset}")


def load_plugin(checkpoint: Path, plugin: Any, rank: int) -> None:
    """Give a plugin its state back; its `load_state_dict` decides what an older version means."""
    if not hasattr(plugin.instance, "load_state_dict"):
        return
    manifest = read_manifest(checkpoint)
    assert manifest is not None, "verify_plugins comes first"
    per_rank = manifest["plugins"][plugin.name]["per_rank"]
    stem = f"state-{rank:05d}" if per_rank else "state"
    plugin.instance.load_state_dict(_read(checkpoint / FOLDER / plugin.name, stem))


def load_rank_state(checkpoint: Path, rank: int, world_size: int) -> State | None:
    """What the trainer kept on this rank; None where the checkpoint has none or another number of ranks wrote it."""
    manifest = read_manifest(checkpoint)
    if manifest is None or manifest["world_size"] != world_size:
        return None
    return _read(checkpoint / FOLDER, f"rank-{rank:05d}")


def _read(folder: Path, stem: str) -> State:
    state: State = json.loads((folder / f"{stem}.json").read_text())
    state.update(load_file(folder / f"{stem}.safetensors"))
    return state


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
