"""On two ranks: averages of FSDP2 shards against averages of the whole weights, in one process each."""

from __future__ import annotations

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from trajectories import context_of
from trl_ext_averaging import Bema, Ema, Lawa, Swa, WiseFt

from trl_ext.own_passes import drop_gathered_weights
from trl_ext.testing import tiny_llama

PLUGINS = [
    (Ema, {"decay": [0.8, 0.5], "compare": True}),
    (Bema, {"every": 2}),
    (Swa, {"start": 1}),
    (Lawa, {"k": 2, "every": 1}),
    (WiseFt, {"alpha": 0.3}),
]
IDS = torch.arange(24).view(2, 12) % 259


class Run:
    """SGD on one batch, the same on every rank, with all averages at once."""

    def __init__(self, sharded: bool) -> None:
        self.model = tiny_llama(hidden=16)
        if sharded:
            for layer in self.model.model.layers:
                fully_shard(layer)
            fully_shard(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
        self.context = context_of(self.model, sharded=sharded)  # once, as the core does: while nothing is gathered
        self.view = self.context.weights
        self.plugins = self.fresh_plugins()

    def fresh_plugins(self) -> list:
        plugins = [method(**options) for method, options in PLUGINS]
        for plugin in plugins:
            plugin.setup(self.context)
        return plugins

    def train(self, steps: range) -> None:
        for step in steps:
            self.model(input_ids=IDS, labels=IDS).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            for plugin in self.plugins:
                plugin.weights_updated(self.view, step, False)

    def look(self) -> list[torch.Tensor]:
        """Logits, then all parameters gathered, with the weights of the moment."""
        drop_gathered_weights(self.model)  # as the core does where it has put other weights in place
        with torch.no_grad():
            logits = self.model(input_ids=IDS).logits
        return [logits, *(p.full_tensor() if isinstance(p, DTensor) else p.clone() for p in self.model.parameters())]

    def look_at_averages(self) -> list[torch.Tensor]:
        seen = []
        for plugin in self.plugins:
            contexts = plugin.deployed_weights(self.view)
            for context in contexts.values() if isinstance(contexts, dict) else [contexts]:
                with context:
                    seen += self.look()
                seen += self.look()
        return seen


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # fp32; gradients may be summed in another order


def main() -> None:
    torch.manual_seed(0)
    whole, shards = Run(sharded=False), Run(sharded=True)
    for run in (whole, shards):
        run.train(range(1, 4))
    local = shards.view.local()
    assert all(tensor.numel() < p.numel() for tensor, p in zip(local, whole.model.parameters(), strict=True))
    averages = shards.look_at_averages()
    same(averages, whole.look_at_averages())
    assert not torch.allclose(averages[0], shards.look()[0], atol=1e-3)

    # Evaluating in between must not leave gathered averages behind for the next step.
    for run in (whole, shards):
        drop_gathered_weights(run.model)
        run.train(range(4, 6))
    same(shards.look(), whole.look())

    # The state gives the averages back.
    before = shards.look_at_averages()
    states = [plugin.state_dict() for plugin in shards.plugins]
    shards.plugins = shards.fresh_plugins()
    for plugin, state in zip(shards.plugins, states, strict=True):
        plugin.load_state_dict(state)
    assert all(torch.equal(one, other) for one, other in zip(shards.look_at_averages(), before, strict=True))
