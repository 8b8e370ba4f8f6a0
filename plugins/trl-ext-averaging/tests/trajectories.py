"""Recorded trajectories: a model whose weights are set to given values after every step, as the core would call."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trl_ext.records import SetupContext, WeightsView


def view_of(model: nn.Module, sharded: bool = False) -> WeightsView:
    """The model's weights as the core shows them."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return WeightsView(tuple(trainable), tuple(trainable.values()), dict(model.named_buffers()), sharded)


def context_of(model: nn.Module, resuming: bool = False, sharded: bool = False) -> SetupContext:
    """What the core hands to `setup` for this model."""
    weights = view_of(model, sharded)
    return SetupContext(
        trainer="sft",
        model=model,
        weights=weights,
        names=weights.names,
        device=weights.parameters[0].device,
        rank=0,
        world_size=1,
        sharded=sharded,
        gradient_accumulation_steps=1,
        max_steps=100,
        output_dir="",
        resuming=resuming,
        tokenizer=None,
    )


class Recorded(nn.Module):
    """One frozen and two trainable parameters (a matrix and a vector), filled from a vector."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.full((2,), 7.0, dtype=dtype), requires_grad=False)
        self.matrix = nn.Parameter(torch.zeros(2, 3, dtype=dtype))
        self.vector = nn.Parameter(torch.zeros(4, dtype=dtype))
        self.register_buffer("counter", torch.zeros((), dtype=dtype))

    @torch.no_grad()
    def fill(self, values: Tensor) -> None:
        self.matrix.copy_(values[:6].view(2, 3))
        self.vector.copy_(values[6:])

    def flat(self) -> Tensor:
        return torch.cat([self.matrix.detach().flatten(), self.vector.detach()])


def trajectory(steps: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """(steps + 1, 10): a random walk, row 0 the start."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps + 1, 10, generator=generator, dtype=torch.float64).cumsum(0).to(dtype)


def play(plugin, model: Recorded, path: Tensor, steps: Iterable[int], skipped: Iterable[int] = ()) -> None:
    """Call `weights_updated` for the given steps of a trajectory."""
    skipped = set(skipped)
    for step in steps:
        model.fill(path[step])
        plugin.weights_updated(view_of(model), step, step in skipped)


def deployed(plugin, model: Recorded, name: str | None = None) -> Tensor:
    """The flat weights inside the deployed context (`name` picks one of several)."""
    context = plugin.deployed_weights(view_of(model))
    if name is not None:
        context = context[name]
    with context:
        return model.flat()
