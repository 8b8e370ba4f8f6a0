"""Whether a run can read the weights of a checkpoint: accelerate's FSDP has files of its own, and reads no others."""

from __future__ import annotations

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
    if written == reads:
        return
    if reads is None:
        change = "this run has no FSDP, which alone reads them; launch it with FSDP, also on one rank"
    elif written is None:
        change = f"FSDP would look for its own ({reads}); launch this run without FSDP"
    else:
        change = f"this run looks for {reads}; set fsdp_state_dict_type: {written}"
    raise CheckpointError(
        f"{checkpoint} has its weights in {f'files of FSDP ({written})' if written else 'files without shards'}, and "
        f"{change}. Or start afresh from its weights: model_name_or_path: {checkpoint}"
    )


def _written_as(checkpoint: Path) -> str | None:
    if (checkpoint / f"{FSDP_MODEL_NAME}.bin").is_file():
        return "FULL_STATE_DICT"
    return "SHARDED_STATE_DICT" if (checkpoint / f"{FSDP_MODEL_NAME}_0").is_dir() else None
