"""Plugin state in checkpoints: written by each rank, and given back.

checkpoint-30/trl_ext/manifest.json                      written last, lists every file of the checkpoint
                      <plugin>/state.json                 JSON values
                      <plugin>/state.safetensors          tensors; `state-00001.safetensors` a rank, if they differ
                      <plugin>/sharded/                   DTensors, the shards of each rank
                      rank-00000.json, .safetensors       what the trainer itself keeps on each rank
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from trl_ext.checkpoints import sharded_state
from trl_ext.checkpoints.files import Gather, read_json
from trl_ext.checkpoints.manifest import FOLDER
from trl_ext.errors import CheckpointError

State = dict[str, Any]
"""Flat: names to tensors and JSON values."""
Sharded = dict[str, DTensor]
_RESERVED = "__metadata__"
"""The one name that a tensor in a safetensors file cannot have."""


def save_state(
    checkpoint: Path, plugins: Iterable[Any], rank_state: Callable[[], State], *, rank: int, gather: Gather
) -> None:
    """Write the plugins' and the trainer's state. Collective.

    Args:
        checkpoint: the checkpoint's folder.
        plugins: the active plugins (`ActivePlugin`).
        rank_state: gives what the trainer keeps on this rank.
        rank: of this process.
        gather: gives the list of every rank's object, on every rank.

    Raises:
        CheckpointError: on every rank, where a state on any of them cannot be given or written. It names the plugin.
    """
    failure, sharded = None, {}
    try:
        sharded = _save(checkpoint / FOLDER, plugins, rank_state, rank)
    except (CheckpointError, OSError) as error:
        failure = str(error)
    of_ranks = gather((failure, {plugin: list(tensors) for plugin, tensors in sharded.items()}))
    failures = [text for text, _ in of_ranks if text is not None]
    if failures:
        raise CheckpointError(failures[0])
    names = [names for _, names in of_ranks]
    if any(held != names[0] for held in names):
        raise CheckpointError(f"the plugins' states hold other sharded tensors on other ranks: {names}")
    for plugin, tensors in sharded.items():
        sharded_state.save(checkpoint / FOLDER / plugin, tensors)


def _save(folder: Path, plugins: Iterable[Any], rank_state: Callable[[], State], rank: int) -> dict[str, Sharded]:
    """Write all but the sharded tensors, which it gives by plugin: writing them is a collective."""
    sharded = {}
    for plugin in plugins:
        if not hasattr(plugin.instance, "state_dict"):
            continue
        per_rank = bool(getattr(plugin.instance, "state_per_rank", False))
        state = _state_of(plugin)
        if shards := {name: value for name, value in state.items() if isinstance(value, DTensor)}:
            sharded[plugin.name] = shards
        if rank == 0 or per_rank:
            own = {name: value for name, value in state.items() if name not in shards}
            _write(folder / plugin.name, _stem(per_rank, rank), own, f"plugin {plugin}")
    _write(folder, f"rank-{rank:05d}", rank_state(), "the trainer")
    return sharded


def _state_of(plugin: Any) -> State:
    try:
        state: State = plugin.instance.state_dict()
    except Exception as error:
        raise CheckpointError(f"plugin {plugin} failed in state_dict(): {type(error).__name__}: {error}") from error
    _refuse_names(state, f"plugin {plugin}")
    return state


def _stem(per_rank: bool, rank: int) -> str:
    return f"state-{rank:05d}" if per_rank else "state"


def _write(folder: Path, stem: str, state: State, owner: str) -> None:
    _refuse_names(state, owner)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    values = {k: v for k, v in state.items() if not isinstance(v, Tensor)}
    for name, value in values.items():
        if changed := _changed_by_json(f"[{name!r}]", value):
            raise CheckpointError(f"the state of {owner} would come back as another one: state_dict(){changed}")
    try:
        text = json.dumps(values, indent=2, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the state of {owner} holds what is neither tensor nor JSON: {error}") from error
    (folder / f"{stem}.json").write_text(text)
    try:
        # Shared storage would be refused by safetensors; a state may well hold views of one buffer.
        copies = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        save_file(copies, folder / f"{stem}.safetensors")
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the state of {owner} holds a tensor that cannot be saved: {error}") from error


def _refuse_names(state: Any, owner: str) -> None:
    if not isinstance(state, Mapping):
        raise CheckpointError(f"the state of {owner} is a {type(state).__name__} instead of a dictionary")
    for name in state:
        if not isinstance(name, str) or name == _RESERVED:
            why = "safetensors reserves it" if name == _RESERVED else "names in a state are texts"
            raise CheckpointError(f"the state of {owner} has the name {name!r}: {why}; rename it in state_dict()")


def _changed_by_json(where: str, value: Any) -> str | None:
    """Say what JSON would give back as something else, and what to write instead; None where there is nothing."""
    if isinstance(value, tuple):
        return f"{where} is a tuple, and JSON gives back a list; return a list"
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                return f"{where} has the key {key!r}, and JSON gives back a text; return {str(key)!r}"
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    return next(filter(None, (_changed_by_json(f"{where}[{key!r}]", item) for key, item in items)), None)


def refuse_states(checkpoint: Path, manifest: Mapping[str, Any], plugins: Iterable[Any], world_size: int) -> None:
    """Refuse state that the active plugins cannot read.

    Raises:
        CheckpointError: state of a later version, or in the shards of another number of ranks.
    """
    saved = {record["name"]: record for record in manifest["plugins"] if record["stateful"]}
    reset = "; set reset_plugin_state=True to start the plugins afresh from this checkpoint's weights"
    for plugin in plugins:
        if plugin.name not in saved:
            continue
        record, version = saved[plugin.name], getattr(plugin.instance, "state_version", 1)
        if record["state_version"] > version:
            raise CheckpointError(
                f"{checkpoint}: the state of plugin '{plugin.name}' has version {record['state_version']}, "
                f"plugin {plugin} reads up to {version}; upgrade its distribution{reset}"
            )
        if record["per_rank"] and manifest["world_size"] != world_size:
            raise CheckpointError(
                f"{checkpoint}: plugin '{plugin.name}' was saved in shards by {manifest['world_size']} ranks, and this "
                f"run has {world_size}: only the plugin knows how its shards fit together{reset}"
            )


def load_plugin(checkpoint: Path, plugin: Any, per_rank: bool, rank: int, layout: DTensor | None) -> None:
    """Give a plugin its state back; its `load_state_dict` decides what an older version means.

    Args:
        layout: a sharded parameter of this run, after which sharded tensors are laid out; None where there is none.
    """
    folder = checkpoint / FOLDER / plugin.name
    state = _read(folder, _stem(per_rank, rank)) | sharded_state.load(folder, layout)
    plugin.instance.load_state_dict(state)


def load_rank_state(checkpoint: Path, rank: int) -> State:
    """What the trainer kept on a rank.

    Raises:
        CheckpointError: it is missing or corrupt.
    """
    return _read(checkpoint / FOLDER, f"rank-{rank:05d}")


def _read(folder: Path, stem: str) -> State:
    state = read_json(folder / f"{stem}.json", {})
    path = folder / f"{stem}.safetensors"
    try:
        state.update(load_file(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is missing or corrupt: {error}") from error
    return state
