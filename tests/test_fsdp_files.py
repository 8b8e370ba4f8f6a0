"""What a checkpoint of FSDP holds, and what a run that looks for other files is told to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Trainer

from trl_ext.checkpoints.fsdp_files import refuse_other_files
from trl_ext.errors import CheckpointError

FULL = ("pytorch_model_fsdp.bin", "model.safetensors")  # transformers writes the second one beside it
SHARDED = ("pytorch_model_fsdp_0/.metadata",)
LOCAL = ("pytorch_model_fsdp_rank0.bin", "pytorch_model_fsdp_rank1.bin")
PLAIN = ("model.safetensors",)


def folder(path: Path, *files: str) -> Path:
    for name in files:
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return path


@pytest.mark.parametrize(
    ("files", "reads"),
    [
        (PLAIN, None),
        (FULL, "FULL_STATE_DICT"),
        (SHARDED, "SHARDED_STATE_DICT"),
        (FULL + SHARDED, "FULL_STATE_DICT"),
        (FULL + SHARDED, "SHARDED_STATE_DICT"),
    ],
)
def test_a_run_goes_on_from_the_files_that_it_reads(tmp_path: Path, files: tuple[str, ...], reads: str | None) -> None:
    refuse_other_files(folder(tmp_path, *files), reads)


@pytest.mark.parametrize(
    ("files", "reads", "told"),
    [
        (PLAIN, "FULL_STATE_DICT", r"launch this run without FSDP\. Or .*: model_name_or_path: {folder}$"),
        (FULL, None, r"launch it with FSDP, also on one rank\. Or .*: model_name_or_path: {folder}$"),
        (
            FULL,
            "SHARDED_STATE_DICT",
            r"set fsdp_state_dict_type: FULL_STATE_DICT\. Or .* model_name_or_path: {folder}$",
        ),
        (
            SHARDED,
            None,
            r"\(SHARDED_STATE_DICT\).* 'accelerate merge-weights {folder}/pytorch_model_fsdp_0 FOLDER'",
        ),
        (SHARDED, "FULL_STATE_DICT", r"set fsdp_state_dict_type: SHARDED_STATE_DICT\. Or .*'accelerate merge-weights"),
        (FULL + SHARDED, None, r"FSDP \(FULL_STATE_DICT and SHARDED_STATE_DICT\).*: model_name_or_path: {folder}$"),
        (LOCAL, "FULL_STATE_DICT", r"does not read; train again with fsdp_state_dict_type: SHARDED_STATE_DICT$"),
        (LOCAL, "LOCAL_STATE_DICT", r"does not read; train again with"),
        (LOCAL, None, r"does not read; train again with"),
    ],
)
def test_a_run_that_reads_others_is_told_what_to_change(
    tmp_path: Path, files: tuple[str, ...], reads: str | None, told: str
) -> None:
    with pytest.raises(CheckpointError, match=told.replace("{folder}", str(tmp_path))):
        refuse_other_files(folder(tmp_path, *files), reads)


def test_what_transformers_finds_no_weights_in_is_refused(tmp_path: Path) -> None:
    """Its own words for files that each rank has written for itself."""
    trainer = object.__new__(Trainer)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="Can't find a valid checkpoint"):
        trainer._load_from_checkpoint(str(folder(tmp_path, *LOCAL)), torch.nn.Module())
