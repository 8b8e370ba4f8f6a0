"""Run by torchrun: averages of FSDP2 shards are saved by some ranks, and taken over by any other number of ranks."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from fsdp_worker import Run, same
from safetensors.torch import load_file, save_file

from trl_ext.checkpoints import plugin_state
from trl_ext.gradients import local_tensor


def gather(value: object) -> list[object]:
    values: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def active(run: Run) -> list[SimpleNamespace]:
    return [SimpleNamespace(name=plugin.method, instance=plugin) for plugin in run.plugins]


def whole_parameters(run: Run) -> dict[str, torch.Tensor]:
    return dict(zip(run.view.names, run.look()[1:], strict=True))


def set_parameters(run: Run, values: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in zip(run.view.names, run.view.parameters, strict=True):
            whole = values[name]
            if run.view.sharded:
                mine = torch.distributed.tensor.distribute_tensor(whole, parameter.device_mesh, parameter.placements)
                whole = mine.to_local()
            local_tensor(parameter.detach()).copy_(whole)


def main(mode: str, folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    run = Run(sharded=world > 1)
    if mode == "save":
        run.train(range(1, 4))
        plugin_state.save_state(folder, active(run), dict, rank=rank, gather=gather)
        parameters, averages = whole_parameters(run), run.look_at_averages()
        run.train(range(4, 6))
        later = run.look_at_averages()
        if rank == 0:
            save_file(parameters, folder / "parameters.safetensors")
            torch.save({"at": averages, "later": later}, folder / "averages.pt")
    else:
        set_parameters(run, load_file(folder / "parameters.safetensors"))
        layout = run.view.parameters[0] if run.view.sharded else None
        for plugin in active(run):
            plugin_state.load_plugin(folder, plugin, per_rank=False, rank=rank, layout=layout)
        expected = torch.load(folder / "averages.pt")
        averages = run.look_at_averages()
        # Logits are sums over gathered weights; the weights themselves have to be the same bits.
        for one, other in zip(averages, expected["at"], strict=True):
            assert torch.equal(one, other) or one.dim() == 3
        same(averages, expected["at"])
        run.train(range(4, 6))
        same(run.look_at_averages(), expected["later"])
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
