"""What the processes of a comparison do: one training of an arm, or the measures of what it left."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from trl_ext.jobs import COSTS

COSTS_FILE = "costs.jsonl"


def train(kind: str, config: str, folder: str) -> None:
    """Run `trl-ext KIND --config CONFIG` to its end, from the newest complete checkpoint where there is one.

    Args:
        kind: `sft`, `grpo`, ...
        config: The YAML, whose output_dir is `folder`.
        folder: For the model; checkpoints in it go when the training has ended.

    Raises:
        SystemExit: The training failed, or left no model.
    """
    from trl_ext.cli import run

    os.environ[COSTS] = str(Path(folder).absolute().parent / COSTS_FILE)
    code = run([kind, "--config", config, *resuming(Path(folder))])
    if code:
        sys.exit(code)
    refuse_no_model(Path(folder))
    for checkpoint in Path(folder).glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def resuming(folder: Path) -> list[str]:
    """The flags with which a training goes on in a folder; what a killed one has not saved as a whole is removed."""
    from trl_ext.checkpoints import newest_complete

    newest, incomplete = newest_complete(folder)
    for path, _ in incomplete:
        shutil.rmtree(path)
    return [] if newest is None else ["--resume_from_checkpoint", str(newest)]


def refuse_no_model(folder: Path) -> None:
    """End the process where a training has left no model.

    Raises:
        SystemExit: With the folder.
    """
    if not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
        print(f"the training left no model in {folder}")
        sys.exit(1)


def measure(measures: dict[str, Any], model: str, base: str, folder: str) -> dict[str, float | None]:
    """All measures of a model; see `values_of`."""
    import datasets
    from transformers.utils import logging

    from trl_ext_probing.comparing.measures import values_of

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    return values_of(measures, model, base, Path(folder))
