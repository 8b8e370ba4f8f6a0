"""Is a checkpoint complete? An incomplete one is told from the files, never resumed from, and set aside.

TRL writes `trainer_state.json` after the folder of trl_ext and rotates old checkpoints after that. So a checkpoint is
complete when `trainer_state.json` can be read and every file of the manifest is there with its size, and an old one is
deleted only once its successor is complete.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_ext.checkpoints.plugin_state import FOLDER, read_manifest
from trl_ext.errors import CheckpointError

# What a checkpoint of plain TRL has; DeepSpeed keeps all of it in a folder of its own.
_PARTS = {
    "model": ("*.safetensors", "pytorch_model*", "adapter_model*", "global_step*"),
    "optimizer state": ("optimizer*", "global_step*"),
    "scheduler state": ("scheduler*", "global_step*"),
    "random state": ("rng_state*",),
}


def incompleteness(checkpoint: Path, model_only: bool = False) -> str | None:
    """Why a checkpoint cannot be resumed from, or None if it is complete.

    Args:
        checkpoint: its folder.
        model_only: whether the run saves no optimiser (`save_only_model`), so that none is missed.
    """
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        state["global_step"]
    except (OSError, ValueError, KeyError) as error:
        return f"trainer_state.json, which is written last, is missing or cut off ({type(error).__name__})"
    folder = checkpoint / FOLDER
    if folder.is_dir():
        try:
            manifest = read_manifest(checkpoint)
        except CheckpointError as error:
            return str(error)
        if manifest is None:
            return f"{FOLDER}/manifest.json is missing"
        for relative, size in manifest["sizes"].items():
            path = checkpoint / relative
            if not path.is_file():
                return f"{relative} is missing"
            if path.stat().st_size != size:
                return f"{relative} has {path.stat().st_size} bytes instead of {size}"
        return None
    for part, patterns in _PARTS.items():
        needed = part == "model" or not model_only
        if needed and not any(next(checkpoint.glob(pattern), None) for pattern in patterns):
            return f"there is no {part} in it"
    return None


def newest_complete(output_dir: Path, model_only: bool = False) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The complete checkpoint with the highest step, and the incomplete ones with the reason."""
    found = []
    for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if path.is_dir() and step.isdigit():
            found.append((int(step), path))
    complete, incomplete = None, []
    for _, path in sorted(found):
        reason = incompleteness(path, model_only)
        if reason is None:
            complete = path
        else:
            incomplete.append((path, reason))
    return complete, incomplete


def set_aside(checkpoint: Path) -> Path:
    """Rename an incomplete checkpoint so that neither resuming nor rotation counts it; nothing is deleted."""
    target = checkpoint.with_name(f"incomplete-{checkpoint.name}")
    n = 1
    while target.exists():
        n += 1
        target = checkpoint.with_name(f"incomplete-{checkpoint.name}.{n}")
    checkpoint.rename(target)
    return target
