"""A checkpoint on disk: a model or a PEFT adapter in safetensors, sharded or not; and the checkpoints of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from trl_ext.errors import CheckpointError
from trl_ext_averaging.offline.tensorfile import TensorEntry, read_header

MODEL, ADAPTER = "model.safetensors", "adapter_model.safetensors"
PREFIX = "checkpoint-"


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint by name, not read yet, and its config."""

    path: Path
    kind: Literal["model", "adapter"]
    entries: Mapping[str, TensorEntry]
    config: Mapping[str, Any]

    @cached_property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    @cached_property
    def step(self) -> int | None:
        """The optimiser step that the trainer wrote it at, if it says so."""
        state = self.path / "trainer_state.json"
        step = read_json(state).get("global_step") if state.is_file() else None
        if step is not None and type(step) is not int:
            raise CheckpointError(f"{state}: global_step {step!r} is not a number of steps")
        return step


def open_checkpoint(path: Path) -> Checkpoint:
    """Read a folder's headers and config.

    Raises:
        CheckpointError: there is nothing to read, or only in part; the message says what is missing.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder; download a model first: hf download <id> --local-dir <folder>")
    if (path / "adapter_config.json").is_file():
        return Checkpoint(path, "adapter", _entries(path, ADAPTER), read_json(path / "adapter_config.json"))
    return Checkpoint(path, "model", _entries(path, MODEL), read_json(path / "config.json"))


def checkpoints_of(run: Path) -> list[Checkpoint]:
    """The checkpoints `checkpoint-<step>` of a run's output folder, in the order of their steps; [] if it has none."""
    found = [path for path in run.glob(f"{PREFIX}*") if path.is_dir() and re.fullmatch(f"{PREFIX}[0-9]+", path.name)]
    return [open_checkpoint(path) for path in sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))]


def latest(checkpoints: Sequence[Checkpoint], last: int | None, every: int | None) -> list[Checkpoint]:
    """Thin checkpoints out to those at least `every` steps apart, counted back from the latest, and keep `last`."""
    kept: list[Checkpoint] = []
    for checkpoint in reversed(checkpoints):
        if every is None or not kept or _step(kept[-1]) - _step(checkpoint) >= every:
            kept.append(checkpoint)
    return kept[:last][::-1]


def _step(checkpoint: Checkpoint) -> int:
    if checkpoint.step is None:
        raise CheckpointError(f"{checkpoint.path} has no trainer_state.json to tell its step; omit --every")
    return checkpoint.step


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        CheckpointError: there is none.
    """
    try:
        content = json.loads(_existing(path).read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__} instead of a mapping")
    return content


def _entries(path: Path, single: str) -> dict[str, TensorEntry]:
    index = path / f"{single}.index.json"
    if index.is_file():
        entries = _sharded_entries(index)
    elif not (path / single).is_file() and (pickled := sorted(path.glob("*.bin"))):
        raise CheckpointError(f"{path} holds pickled weights ({pickled[0].name}); save them as safetensors first")
    elif not (path / single).is_file() and any(path.glob(f"{PREFIX}*")):
        raise CheckpointError(f"{path} is a run, not a checkpoint; use --method lawa or ema, or name {PREFIX}<step>")
    else:
        entries = read_header(_existing(path / single))
    if not entries:
        raise CheckpointError(f"{path} holds no tensors")
    return entries


def _sharded_entries(index: Path) -> dict[str, TensorEntry]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map of tensors and their files")
    shards = {shard: read_header(_existing(index.parent / shard)) for shard in dict.fromkeys(weight_map.values())}
    missing = [name for name, shard in weight_map.items() if name not in shards[shard]]
    if missing:
        raise CheckpointError(f"{index} promises {missing[0]}, which is not in {weight_map[missing[0]]}")
    return {name: entry for shard in shards.values() for name, entry in shard.items() if name in weight_map}


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    return path
