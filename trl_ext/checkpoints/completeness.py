"""Is a checkpoint complete? An incomplete one is told from the files, never resumed from, and set aside.

A run with plugins writes its manifest last, before old checkpoints are deleted: such a checkpoint is complete when
every file of the manifest is there with its size and, unless that is switched off, its checksum. One of plain TRL is
complete when `trainer_state.json`, which is its last file, can be read and the parts that TRL needs are there.
"""

from __future__ import annotations

import re
from pathlib import Path

from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_ext.checkpoints.files import read_json
from trl_ext.checkpoints.manifest import read_manifest, wrong_content, wrong_size
from trl_ext.errors import CheckpointError

# What a checkpoint of plain TRL has; DeepSpeed keeps all of it in a folder of its own.
_PARTS = {
    "model": ("*.safetensors", "pytorch_model*", "adapter_model*", "global_step*"),
    "optimizer state": ("optimizer*", "global_step*"),
    "scheduler state": ("scheduler*", "global_step*"),
    "random state": ("rng_state*",),
}
_FOLDER_NAME = re.compile(rf"{re.escape(PREFIX_CHECKPOINT_DIR)}-([0-9]+)")
_STATE_SHAPE = {"global_step": int, "max_steps": int, "log_history": list, "stateful_callbacks": dict}


def incompleteness(checkpoint: Path, model_only: bool = False) -> str | None:
    """Why a checkpoint cannot be resumed from, or None if all of it is there. Contents are not compared here.

    Args:
        checkpoint: its folder.
        model_only: whether the run saves no optimiser (`save_only_model`), so that none is missed.
    """
    try:
        manifest = read_manifest(checkpoint)
        if manifest is not None and (reason := wrong_size(checkpoint, manifest)):
            return reason
        _read_trainer_state(checkpoint / "trainer_state.json")
    except CheckpointError as error:
        return str(error)
    return _missing_part(checkpoint, model_only) if manifest is None else None


def corruption(checkpoint: Path) -> str | None:
    """Which files of a complete checkpoint differ from their checksums; None if there is none."""
    manifest = read_manifest(checkpoint)
    return None if manifest is None else wrong_content(checkpoint, manifest, rank=0, gather=lambda value: [value])


def _read_trainer_state(path: Path) -> None:
    content = read_json(path, _STATE_SHAPE)
    try:
        TrainerState(**content)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is corrupt: it holds no state of a trainer ({error})") from error


def _missing_part(checkpoint: Path, model_only: bool) -> str | None:
    for part, patterns in _PARTS.items():
        needed = part == "model" or not model_only
        if needed and not any(next(checkpoint.glob(pattern), None) for pattern in patterns):
            return f"there is no {part} in it"
    return None


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    found = [(_FOLDER_NAME.fullmatch(path.name), path) for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    steps = [(int(match[1]), path) for match, path in found if match and path.is_dir()]
    return [path for _, path in sorted(steps, reverse=True)]


def newest_complete(
    output_dir: Path, model_only: bool = False, verify: bool = True
) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The complete checkpoint with the highest step, and the incomplete ones with the reason, newest first.

    Checksums are compared, where `verify` asks for it, from the newest checkpoint on until one is intact: older ones
    are not read.
    """
    complete, incomplete = None, []
    for path in checkpoints(output_dir):
        reason = incompleteness(path, model_only)
        if reason is None and complete is None and verify:
            reason = corruption(path)
        if reason is not None:
            incomplete.append((path, reason))
        elif complete is None:
            complete = path
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
