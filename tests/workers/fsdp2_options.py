"""Ranks of runs that shard in a way of their own, all of them the same training; and what each saw of its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from fsdp2_on_cpu import fsdp2, run_on_cpu
from helpers import Plugin
from rank_scenarios import SGD, STREAMS, Everything, Weighted, outcome
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from trl_ext import hookimpl
from trl_ext.gradients import GradientView, whole_tensor
from trl_ext.testing import save_model
from trl_ext.testing.runs import make_sft, tiny_model, tokenizer

DECAY, MICRO_STEPS = 0.5, 3
WAYS: dict[str, tuple[DistributedConfig | None, dict[str, Any]]] = {
    "ddp": (None, {}),
    "fsdp2": (DistributedConfig(fsdp_size=4), {}),
    "hsdp": (DistributedConfig(fsdp_size=2, dp_replicate_size=2), {}),
    "mixed precision": (DistributedConfig(fsdp_size=4, fsdp_mixed_precision=True), {}),
    # Last, since accelerate leaves what it has been told in the environment.
    "hsdp, accelerate": (
        None,
        {"parallelism_config": ParallelismConfig(dp_shard_size=2, dp_replicate_size=2), **fsdp2()},
    ),
    "mixed precision, accelerate": (None, {"bf16": True, **fsdp2()}),
}


@dataclass(eq=False)
class Witness(Plugin):
    """Compares what views say with the gathered gradients in fp64, and averages the gathered weights in fp64."""

    errors: list[float] = field(default_factory=list)
    """Of each scalar, relative to the lengths of the gradients."""
    dtypes: set[str] = field(default_factory=set)
    deferred: set[tuple[bool, bool]] = field(default_factory=set)
    """Whether FSDP2's groups scatter and sum gradients in the window's first micro-step, after a stream's pass."""
    average: list[Tensor] = field(default_factory=list)
    micro_steps: int = 0

    @hookimpl
    def setup(self, context):
        self.model, self.parameters = context.model, context.weights.parameters
        self.average = [whole_tensor(p.detach()).double() for p in self.parameters]

    @hookimpl
    def auxiliary_losses(self):
        first, self.micro_steps = self.micro_steps % MICRO_STEPS == 0, self.micro_steps + 1
        for module in self.model.modules():
            if first and isinstance(module, FSDPModule):
                groups = module._get_fsdp_state()._fsdp_param_groups
                self.deferred |= {(group.reduce_grads, group.all_reduce_grads) for group in groups}
        return {}

    @hookimpl
    def gradients_ready(self, gradients, streams):
        views = [gradients, *(stream.gradients for stream in streams.values())]
        vectors = [self._gathered(view) for view in views]
        self.dtypes |= {str(tensor.dtype) for view in views for tensor in view.tensors if tensor is not None}
        a, b = views[0], views[1]
        x, y = vectors[0], vectors[1]
        lengths = x.norm() * y.norm()
        gram = torch.stack([torch.stack([v @ w for w in (x, y)]) for v in (x, y)])
        self.errors += [
            float((a.dot(b) - x @ y).abs() / lengths),
            float((a.norm() - x.norm()).abs() / x.norm()),
            float((b.squared_norm() - y @ y).abs() / (y @ y)),
            float((a.cosine(b) - x @ y / lengths).abs()),
            float((a.grams(b).sum(0) - gram).abs().max() / gram.abs().max()),
        ]

    @hookimpl
    def weights_updated(self, weights):
        now = [whole_tensor(p.detach()).double() for p in weights.parameters]
        self.average = [DECAY * mean + (1 - DECAY) * p for mean, p in zip(self.average, now, strict=True)]

    def _gathered(self, view: GradientView) -> Tensor:
        return torch.cat([self._whole(g, p) for g, p in zip(view.tensors, view.parameters, strict=True)])

    @staticmethod
    def _whole(local: Tensor | None, parameter: Tensor) -> Tensor:
        if local is None:
            return torch.zeros(parameter.numel(), dtype=torch.float64)
        if isinstance(parameter, DTensor):
            layout = parameter.device_mesh, parameter.placements
            local = DTensor.from_local(local, *layout, shape=parameter.shape, stride=parameter.stride()).full_tensor()
        return local.double().flatten()


def run(folder: Path, way: str) -> dict[str, Any]:
    distributed, settings = WAYS[way]
    world, witness, model = dist.get_world_size(), Witness(), tiny_model()
    if distributed is not None:
        model = AutoModelForCausalLM.from_pretrained(folder / "start", distributed_config=distributed)
    trainer = make_sft(
        folder / way,
        model=model,
        names=["power:alpha=0.2", f"ema:decay={DECAY}"],
        plugins=[Weighted(), witness, Everything(4 // world)],
        streams={role: make() for role, make in STREAMS.items()},
        max_steps=3,
        per_device_train_batch_size=8 // world,
        gradient_accumulation_steps=MICRO_STEPS,
        rank_check_steps=1,
        **SGD,
        **settings,
    )
    trainer.train()
    trainer.save_model(str(folder / way))
    dist.barrier()
    saved = load_file(folder / way / "model.safetensors")
    weights = trainer.ext_weights
    return {
        **outcome(trainer),
        "sharded": weights.sharded,
        "dtypes": witness.dtypes | {str(p.dtype) for p in weights.parameters},
        "errors": witness.errors,
        "deferred": witness.deferred,
        "average": dict(zip(weights.names, witness.average, strict=True)),
        "saved": {name: saved[name].double() for name in weights.names},
        "dimensions": {p.device_mesh.ndim for p in weights.parameters if isinstance(p, DTensor)},
    }


def main(folder: Path, ways: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What this rank found in each of these ways."""
    run_on_cpu()
    if dist.get_rank() == 0:
        save_model(tiny_model(), tokenizer(), folder / "start")
    dist.barrier()
    return {way: run(folder, way) for way in ways}
