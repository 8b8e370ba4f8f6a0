"""A checkpoint on disk: a model or a PEFT adapter in safetensors, sharded or not; and the checkpoints of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def step(self) -> int | None:
        """The optimiser step that the trainer wrote it at, if it says so."""
        state = self.path / "trainer_state.json"
        return json.loads(state.read_text()).get("global_step") if state.is_file() else None


def open_checkpoint(path: Path) -> Checkpoint:
    """Read a folder's headers and config.

    Raises:
        CheckpointError: there is nothing to read, or only in part; the message says what is missing.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder; download a model first: hf download <id> --local-dir <folder>")
    if (path / "adapter_config.json").is_file():
        return Checkpoint(path, "adapter", _entries(path, ADAPTER), _json(path / "adapter_config.json"))
    return Checkpoint(path, "model", _entries(path, MODEL), _json(path / "config.json"))


def checkpoints_of(run: Path) -> list[Checkpoint]:
    """The checkpoints `checkpoint-<step>` of a run's output folder, in the order of their steps; [] if it has none."""
    steps = sorted(
        (int(path.name.removeprefix(PREFIX)), path)
        for path in run.glob(f"{PREFIX}*")
        if path.is_dir() and path.name.removeprefix(PREFIX).isdigit()
    )
    return [open_checkpoint(path) for _, path in steps]


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


def _entries(path: Path, single: str) -> dict[str, TensorEntry]:
    index = path / f"{single}.index.json"
    if index.is_file():
        weight_map = _json(index).get("weight_map", {})
        shards = {shard: read_header(_existing(path / shard)) for shard in dict.fromkeys(weight_map.values())}
        missing = [name for name, shard in weight_map.items() if name not in shards[shard]]
        if missing:
            raise CheckpointError(f"{index} promises {missing[0]}, which is not in {weight_map[missing[0]]}")
        return {name: entry for shard in shards.values() for name, entry in shard.items() if name in weight_map}
    if not (path / single).is_file() and (pickled := sorted(path.glob("*.bin"))):
        raise CheckpointError(f"{path} holds pickled weights ({pickled[0].name}); save them as safetensors first")
    if not (path / single).is_file() and any(path.glob(f"{PREFIX}*")):
        raise CheckpointError(f"{path} is a run, not a checkpoint; use --method lawa or ema, or name {PREFIX}<step>")
    return read_header(_existing(path / single))


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    return path


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(_existing(path).read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
