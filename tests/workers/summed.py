"""Ranks of runs whose gradients are summed in ways of their own, and the gradients of streams that each saw."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from fsdp2_on_cpu import fsdp2, run_on_cpu
from helpers import Plugin
from rank_scenarios import SGD, STREAMS
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from trl_ext import hookimpl
from trl_ext.gradients import as_sharded, whole_tensor
from trl_ext.records import StreamRequest
from trl_ext.testing import save_model
from trl_ext.testing.runs import lora, make_sft, parameters, tiny_model, tokenizer

SHARDED = ("adapter on shards", "shards, every micro-step")
"""Sharded by transformers, as they load."""


def settings(way: str) -> dict[str, Any]:
    """Of a run; made anew for each, since transformers writes into them."""
    given: dict[str, Any] = {}
    if "every micro-step" in way:
        given["accelerator_config"] = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    if way == "compiled":
        given |= {"torch_compile": True, "torch_compile_backend": "eager"}
    # Last, since accelerate leaves what it has been told in the environment.
    return given | fsdp2() if "accelerate" in way else given


WAYS = {
    "ddp": "ddp",
    "compiled": "ddp",
    "shards, every micro-step": "ddp",
    "adapter": "adapter",
    "adapter on shards": "adapter",
    "shards of accelerate, every micro-step": "ddp",
}
"""Each with the one that it has to agree with."""


@dataclass(eq=False)
class Streams(Plugin):
    """Keeps the gradients of a stream before the window, whose first micro-step does not sum them, and of one after."""

    share: int = 2
    seen: list[dict[str, Tensor]] = field(default_factory=list)
    sharded: bool = False

    @hookimpl
    def setup(self, context):
        self.sharded = context.sharded

    @hookimpl
    def streams(self):
        return [StreamRequest("target", self.share, "before"), StreamRequest("general", self.share)]

    @hookimpl
    def gradients_ready(self, gradients, streams):
        found = {}
        for role, stream in streams.items():
            view = stream.gradients
            for name, parameter, tensor in zip(view.names, view.parameters, view.tensors, strict=True):
                assert tensor is not None, f"{role}: {name} has no gradient"
                found[f"{role}: {name}"] = whole_tensor(as_sharded(tensor, parameter)).clone()
        self.seen.append(found)


def run(folder: Path, way: str) -> dict[str, Any]:
    ranks, model, plugin = dist.get_world_size(), tiny_model(), Streams()
    if way in SHARDED:
        shards = DistributedConfig(fsdp_size=ranks)
        model = AutoModelForCausalLM.from_pretrained(folder / "start", distributed_config=shards)
    trainer = make_sft(
        folder / "run",
        model=model,
        plugins=[plugin],
        streams={role: make() for role, make in STREAMS.items()},
        trainer={"peft_config": lora()} if "adapter" in way else {},
        max_steps=2,
        per_device_train_batch_size=8 // ranks,
        gradient_accumulation_steps=2,
        rank_check_steps=1,
        **SGD,
        **settings(way),
    )
    if "adapter" in way:  # parameters that FSDP2 sums the gradients of, beside those that it knows nothing of
        for name, parameter in trainer.model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or "norm" in name)
    trainer.train()
    return {"seen": plugin.seen, "sharded": plugin.sharded, "parameters": parameters(trainer)}


def main(folder: Path) -> dict[str, dict[str, Any]]:
    """What this rank found in each way."""
    run_on_cpu()
    if dist.get_rank() == 0:
        save_model(tiny_model(), tokenizer(), folder / "start")
    dist.barrier()
    return {way: run(folder, way) for way in WAYS}
