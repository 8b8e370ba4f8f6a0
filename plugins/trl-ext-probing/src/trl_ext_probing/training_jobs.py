"""One training as a job: the command line runs in a process of its own, and goes on from its newest checkpoint."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from trl_ext.jobs import COSTS

COSTS_FILE = "costs.jsonl"
MODEL = "model"
"""In the folder of the job, what the training leaves."""


def train(
    folder: str, arguments: Sequence[str], launcher: Sequence[str] = (), forget_checkpoints: bool = False
) -> None:
    """Run a training command to its end, from the newest complete checkpoint where there is one.

    Args:
        folder: Of the job; the command's output_dir is `model` in it.
        arguments: The command line after `trl-ext`.
        launcher: Words before it, as of torchrun; with none it runs in this process.
        forget_checkpoints: Remove them when the training has ended.

    Raises:
        SystemExit: The training failed, or left no model.
    """
    from trl_ext.cli import run

    model = Path(folder, MODEL)
    os.environ[COSTS] = str(Path(folder).absolute() / COSTS_FILE)
    newest = newest_checkpoint(model)
    command = [*arguments, *([] if newest is None else ["--resume_from_checkpoint", str(newest)])]
    code = subprocess.run([*launcher, *command]).returncode if launcher else run(command)
    if code:
        sys.exit(code)
    if not any((model / name).exists() for name in ("config.json", "adapter_config.json")):
        sys.exit(f"the training left no model in {model}")
    if forget_checkpoints:
        for checkpoint in model.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


def newest_checkpoint(folder: Path) -> Path | None:
    """Where a training goes on; what a killed one has not saved as a whole is removed."""
    from trl_ext.checkpoints import newest_complete

    newest, incomplete = newest_complete(folder)
    for path, _ in incomplete:
        shutil.rmtree(path)
    return newest
