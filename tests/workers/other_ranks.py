"""Ranks of a run that goes on with another number of them, each with its share of the same global batch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from fsdp2_on_cpu import fsdp2, run_on_cpu

from trl_ext.testing.runs import additions, logged, make_sft, parameters

ROWS = 6
"""Samples of a step, and of the stream beside it, over all ranks."""
CASES: dict[str, str] = {
    "surgery": "gradient-surgery:method=pcgrad,scope=layer,stream_batch_size={}",
    "cone": "data-regularization:rule=cone,engine=sketch,sketch_size=256,stream_batch_size={}",
    "derivative": "data-regularization:scope=global,engine=derivative,stream_batch_size={}",
}
STREAM = {"surgery": "general", "cone": "target", "derivative": "target"}


def main(
    folder: Path,
    case: str,
    last: int,
    sharded: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train up to a step from where the folder's newest checkpoint is, and save.

    Args:
        folder: of the run and of what it saves.
        case: one of `CASES`.
        last: optimiser steps of the whole run.
        sharded: settings of FSDP2; None is DDP.
        config: other settings of the run.
    """
    share = ROWS // dist.get_world_size()
    if sharded is not None:
        run_on_cpu()
    trainer = make_sft(
        folder / "run",
        names=["ema:decay=0.5", CASES[case].format(share)],
        streams={STREAM[case]: additions(11, seed=3)},
        **{
            "train": additions(20),  # three whole steps, so that the run is in its second pass in the end
            "dataloader_drop_last": True,  # accelerate would fill the fourth with rows again, by the number of ranks
            "max_steps": last,
            "per_device_train_batch_size": share,
            "save_strategy": "steps",
            "save_steps": 2,
            "optim": "sgd",
            "optim_args": "momentum=0.9",
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",  # the others know how many steps are to come
            "resume_changes": "warn",  # the stream's batch is an option a rank
            "ddp_timeout": 60,
            **(config or {}),
            **({} if sharded is None else fsdp2(**sharded)),
        },
    )
    start = parameters(trainer)
    resumed = any((folder / "run").glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=True if resumed else None)
    trainer.save_model(str(folder / "final"))
    return {
        "logs": logged(trainer),
        "sharded": trainer.ext_weights.sharded,
        "moved": max(float((p - start[name]).abs().max()) for name, p in parameters(trainer).items()),
        "positions": {role: stream.position for role, stream in trainer.ext_streams.items()},
    }
