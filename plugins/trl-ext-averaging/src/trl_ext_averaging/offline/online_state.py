"""Averages that a training run kept beside the one it deployed: read from a checkpoint's plugin state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trl_ext.errors import CheckpointError
from trl_ext_averaging.offline.checkpoint import Checkpoint
from trl_ext_averaging.offline.tensorfile import TensorEntry, read_header

STATE = "trl_ext/*/state.safetensors"


def open_online_average(raw: Checkpoint, average: str) -> Checkpoint:
    """A training checkpoint with the raw weights replaced by an average in its state (`ema`, `ema_0.99`, `swa`).

    The state holds sums in fp32; `raw` still says which dtypes the weights have.

    Raises:
        CheckpointError: no such average; the message names those that are there.
    """
    path = raw.path
    found = _averages(path)
    if average not in found:
        sharded = any(path.glob("trl_ext/*/sharded/*.safetensors"))
        there = ", ".join(sorted(found)) or ("only shards of single ranks" if sharded else "none")
        raise CheckpointError(f"{path} holds no average {average!r}; it holds {there}")
    entries = dict(raw.entries)
    for name, entry in found[average].items():
        stored = name.replace(".default.", ".") if raw.kind == "adapter" else name
        if stored not in entries or entries[stored].shape != entry.shape:
            raise CheckpointError(
                f"{path}: the average {average!r} has a parameter {name} that the weights do not have"
            )
        entries[stored] = entry
    return replace(raw, entries=entries)


def _averages(path: Path) -> dict[str, dict[str, TensorEntry]]:
    """The averages in the state of all plugins, by name; not those made of several copies (BEMA, WiSE-FT, LAWA)."""
    found: dict[str, dict[str, TensorEntry]] = {}
    for file in sorted(path.glob(STATE)):
        copies = {key.partition("/")[0] for key in read_header(file) if "/" in key}
        if "start" not in copies and not any(copy.startswith("snapshot_") for copy in copies):
            for key, entry in read_header(file).items():
                copy, _, name = key.partition("/")
                found.setdefault(copy, {})[name] = entry
    return found
