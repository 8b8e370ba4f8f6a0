"""On two ranks: the composite on sharded weights, saved and loaded by what the trainer calls under FSDP2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.utils.fsdp_utils import load_fsdp_optimizer, save_fsdp_optimizer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from trl_ext_mixing import chunks
from trl_ext_mixing.composite import BranchAverage

from trl_ext.testing import tiny_llama


def sharded(state: dict[str, Tensor] | None = None) -> tuple[nn.Module, BranchAverage]:
    model = tiny_llama(hidden=16)
    if state is not None:
        model.load_state_dict(state)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return model, BranchAverage(torch.optim.AdamW(groups, 1e-2), lr_ratio=0.5)


def step(model: nn.Module, optimizer: BranchAverage, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parameters = list(model.parameters())

    def gradients() -> Sequence[Tensor]:
        whole = [torch.randn(p.shape, generator=generator) for p in parameters]
        return [distribute_tensor(g, p.device_mesh, p.placements) for g, p in zip(whole, parameters, strict=True)]

    for p, g in zip(parameters, gradients(), strict=True):
        p.grad = g
    optimizer.coefficient = 0.25
    optimizer.give_sft(dict(zip(parameters, gradients(), strict=True)))
    optimizer.step()
    optimizer.zero_grad()


def uneven() -> None:
    """Shards of other sizes on both ranks, cut into other numbers of chunks: the comparisons are those unsharded."""
    chunks.CHUNK["cpu"] = 10
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 2), (5, 2), (3, 2), (1, 3)]
    values, rl, sft = ([torch.randn(s, generator=generator) for s in shapes] for _ in range(3))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    read = []
    for split in (True, False):

        def placed(tensors: Sequence[Tensor], split: bool = split) -> list[Tensor]:
            return [distribute_tensor(t, mesh, [Shard(0)]) if split else t.clone() for t in tensors]

        parameters = [nn.Parameter(t) for t in placed(values)]
        optimizer = BranchAverage(torch.optim.SGD(parameters, 0.1))
        for p, g in zip(parameters, placed(rl), strict=True):
            p.grad = g
        optimizer.give_sft(dict(zip(parameters, placed(sft), strict=True)))
        optimizer.step()
        read.append(optimizer.updates.read())
    for name, value in read[0].items():
        assert abs(value - read[1][name]) < 1e-6, (name, read)


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.full_tensor().detach().clone() for name, p in model.named_parameters()}


def saved_and_loaded(folder: Path, kind: str, accelerator: PartialState) -> None:
    """Three steps, a checkpoint, three more: with the same optimiser, and with one that has loaded the checkpoint."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind)
    model, optimizer = sharded()
    for seed in range(3):
        step(model, optimizer, seed)
    saved = whole(model)
    save_fsdp_optimizer(plugin, accelerator, optimizer, model, str(folder / kind))
    again, resumed = sharded(saved)
    dist.barrier()
    load_fsdp_optimizer(plugin, accelerator, resumed, again, str(folder / kind))
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(again, resumed, seed)
    uninterrupted, continued = whole(model), whole(again)
    for name, value in uninterrupted.items():
        assert torch.equal(value, continued[name]), (kind, name)
        assert not torch.equal(value, saved[name]), (kind, name)


def main(folder: Path) -> None:
    accelerator = PartialState(cpu=True, backend="gloo")
    for kind in ("SHARDED_STATE_DICT", "FULL_STATE_DICT"):
        saved_and_loaded(folder, kind, accelerator)
    uneven()
