"""On all ranks: every scenario, and FSDP2."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from helpers import Plugin
from rank_scenarios import SCENARIOS, STREAMS, Everything, Weighted, algebra, outcome, sft_everything
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from trl_ext import hookimpl
from trl_ext.testing import save_model
from trl_ext.testing.runs import make_sft, tiny_model, tokenizer


@dataclass(eq=False)
class Algebra(Plugin):
    seen: list[dict[str, float]] = field(default_factory=list)

    @hookimpl
    def gradients_ready(self, gradients, streams):
        self.seen.append(algebra(gradients, streams["general"].gradients))


def fsdp2(folder: Path, world: int) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(
        str(folder.parent / "fsdp-model"), distributed_config=DistributedConfig(fsdp_size=world)
    )
    assert any(isinstance(p, DTensor) for p in model.parameters())
    found = Algebra()
    trainer = sft_everything(folder, world, model=model, more=(found,))
    trainer.train()
    return {**outcome(trainer), "algebra": found.seen, "sharded": trainer.ext_weights.sharded}


def unsharded(folder: Path, world: int) -> dict[str, Any]:
    found = Algebra()
    trainer = sft_everything(folder, world, more=(found,))
    trainer.train()
    return {**outcome(trainer), "algebra": found.seen}


def resumed(folder: Path, world: int) -> dict[str, Any]:
    """Saved at step 2 of 4 by all ranks, then continued: against the same run without a break."""
    finals = []
    for checkpoint in (None, str(folder / "checkpoint-2")):
        trainer = make_sft(
            folder,
            names=["power:alpha=0.2", "ema:decay=0.5"],
            plugins=[Weighted(), Everything(2)],
            streams={role: make() for role, make in STREAMS.items()},
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            ddp_timeout=60,
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        finals.append(outcome(trainer)["parameters"])
    return {"first": finals[0], "second": finals[1]}


def main(folder: Path) -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        save_model(tiny_model(), tokenizer(), folder / "fsdp-model")
    dist.barrier()
    found: dict[str, Any] = {}
    for name, build in SCENARIOS.items():
        trainer = build(folder / name, world)
        trainer.train()
        found[name] = outcome(trainer)
    for run in (unsharded, fsdp2, resumed):
        found[run.__name__] = run(folder / run.__name__, world)
    return found
