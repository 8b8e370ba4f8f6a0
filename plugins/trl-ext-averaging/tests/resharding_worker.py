"""Run on several ranks: some save averages of FSDP2 shards, and any other number of ranks takes them over."""

from __future__ import annotations

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


def trained(last: int) -> Run:
    """A run after this many steps: sharded, unless there is one rank."""
    torch.manual_seed(0)
    run = Run(sharded=dist.get_world_size() > 1)
    run.train(range(1, last + 1))
    return run


def save(folder: Path) -> None:
    """Write the state after three steps as a checkpoint does, and beside it what it is, then and two steps later."""
    run, rank = trained(3), dist.get_rank()
    plugin_state.save_state(folder, active(run), dict, rank=rank, gather=gather)
    parameters, averages = whole_parameters(run), run.look_at_averages()
    run.train(range(4, 6))
    later = run.look_at_averages()
    if rank == 0:
        save_file(parameters, folder / "parameters.safetensors")
        torch.save({"at once": averages, "later": later}, folder / "averages.pt")


def take_over(folder: Path) -> None:
    """Load what `save` has written, and go on."""
    run = trained(0)
    set_parameters(run, load_file(folder / "parameters.safetensors"))
    layout = run.view.parameters[0] if run.view.sharded else None
    for plugin in active(run):
        plugin_state.load_plugin(folder, plugin, per_rank=False, rank=dist.get_rank(), layout=layout)
    expected, averages = torch.load(folder / "averages.pt"), run.look_at_averages()
    same(averages, expected["at once"])
    for one, other in zip(averages, expected["at once"], strict=True):
        assert torch.equal(one, other) or one.dim() == 3  # logits are sums over gathered weights; weights are the same
    run.train(range(4, 6))
    same(run.look_at_averages(), expected["later"])
