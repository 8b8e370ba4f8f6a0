"""Ranks of a run that goes on with another number of them, each with its share of the same global batch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import ParallelismConfig
from fsdp2_on_cpu import fsdp2, run_on_cpu

from trl_ext.testing.runs import additions, logged, make_sft, parameters

PROJECTION = "data-regularization:rule=cone,engine=sketch,sketch_size=256,stream_batch_size={}"
DERIVATIVE = "data-regularization:scope=global,engine=derivative,stream_batch_size={}"
SURGERY = "gradient-surgery:method=pcgrad,scope=layer,stream_batch_size={}"
CASES: dict[str, tuple[str, str, int]] = {
    "surgery": (SURGERY, "general", 6),
    "cone": (PROJECTION, "target", 6),
    "derivative": (DERIVATIVE, "target", 6),
    "replicas": (SURGERY, "general", 12),
}
"""A plugin with its batch a rank, its stream, and the samples of a step over all ranks, of the stream too."""


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
    plugin, role, rows = CASES[case]
    ranks = dist.get_world_size()
    share, settings = rows // ranks, dict(config or {})
    if sharded is not None:
        run_on_cpu()
        settings |= fsdp2(**sharded)
        if ranks == 4:  # two replicas of shards
            settings["parallelism_config"] = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)
    trainer = make_sft(
        folder / "run",
        names=["ema:decay=0.5", plugin.format(share)],
        streams={role: additions(11, seed=3)},
        **{
            "train": additions(3 * rows + 2),  # three whole steps, so that the run is in its second pass in the end
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
            **settings,
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
