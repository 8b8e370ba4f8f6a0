"""Whether a run can read the weights of a checkpoint: accelerate's FSDP has files of its own, and reads no others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from accelerate.utils.constants import FSDP_MODEL_NAME

from trl_ext.errors import CheckpointError


def refuse_other_files(checkpoint: Path, reads: str | None) -> None:
    """Refuse a checkpoint whose weights are in files of another kind than those that the run will look for.

    Args:
        checkpoint: its folder.
        reads: the run's `state_dict_type` under FSDP, such as "FULL_STATE_DICT"; None without FSDP.

    Raises:
        CheckpointError: with the setting to change.
    """
    written = _written_as(checkpoint)
    if not written and (checkpoint / f"{FSDP_MODEL_NAME}_rank0.bin").exists():
        raise CheckpointError(
            f"{checkpoint} has its weights in files of FSDP (LOCAL_STATE_DICT) that transformers writes and does not "
            "read; train again with fsdp_state_dict_type: SHARDED_STATE_DICT"
        )
    if reads in written or (reads is None and not written):
        return
    kinds = " and ".join(written)
    if reads is None:
        change = "this run has no FSDP, which alone reads them; launch it with FSDP, also on one rank"
    elif not written:
        change = f"FSDP would look for its own ({reads}); launch this run without FSDP"
    else:
        change = f"this run looks for {reads}; set fsdp_state_dict_type: {next(iter(written))}"
    raise CheckpointError(
        f"{checkpoint} has its weights in {f'files of FSDP ({kinds})' if written else 'files without shards'}, and "
        f"{change}{_other_way(checkpoint, written)}"
    )


def _written_as(checkpoint: Path) -> dict[str, Path]:
    """The weights in the folder that a run under FSDP can read, by the `state_dict_type` of the one that wrote them."""
    places = {
        "FULL_STATE_DICT": checkpoint / f"{FSDP_MODEL_NAME}.bin",
        "SHARDED_STATE_DICT": checkpoint / f"{FSDP_MODEL_NAME}_0",
    }
    return {kind: path for kind, path in places.items() if path.exists()}


def _other_way(checkpoint: Path, written: Mapping[str, Path]) -> str:
    """How to start afresh from these weights; beside shards, transformers writes none that a run could load."""
    if not written or any(checkpoint.glob("*.safetensors")):
        return f". Or start afresh from its weights: model_name_or_path: {checkpoint}"
    if "SHARDED_STATE_DICT" in written:
        merge = f"accelerate merge-weights {written['SHARDED_STATE_DICT']} FOLDER"
        return f". Or start afresh from its weights, which '{merge}' puts into one file, beside the model's config.json"
    return ""
