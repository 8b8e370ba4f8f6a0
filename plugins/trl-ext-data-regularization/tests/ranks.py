"""Runs the cases of `test_ranks.py` on this rank, and saves rank 0's parameters: `torchrun ranks.py CASE,CASE OUT`."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from test_rollouts import run as run_grpo
from test_sft import sharpened
from training import DataRegularization, model, parameters, train
from trl_ext_data_regularization.rollouts import RolloutFilter

# Per case: the plugin's options. The stream's batch is per rank, so one rank draws twice as many.
CASES = {
    "ghost": {"frac": 0.5},
    "accumulated": {"frac": 0.5},
    "sketch": {"rule": "cone", "engine": "sketch", "sketch_size": 512},
    "global sketch": {"rule": "hull", "scope": "global", "engine": "sketch", "sketch_size": 512},
    "derivative": {"scope": "global", "engine": "derivative", "frac": 0.5},
    "ball": {"rule": "ball", "engine": "sketch", "sketch_size": 512},
    "reverse": {"general": "stream", "rule": "full"},
}
EXACT = {"plain": None, "everything": {"frac": 1.0}, "everything micro": {"frac": 1.0, "unit": "micro"}}
GRPO = {"grpo plain": None, "grpo": {"frac": 0.0}, "grpo filter": {"frac": 1.0}}


def run(case: str, world: int):
    rows = 4 // world
    if case in GRPO:
        plugins = [] if GRPO[case] is None else [RolloutFilter(**GRPO[case])]
        return run_grpo(plugins, model(layers=1), per_device_train_batch_size=rows * 2)
    options = {**CASES, **EXACT}[case]
    accumulation = 2 if case in ("accumulated", *EXACT) else 1
    plugin = None if options is None else DataRegularization(stream_batch_size=4 // world, **options)
    size = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
    return train(plugin, sharpened(model(layers=1)), optim="sgd", learning_rate=0.5, max_steps=2, **size)


if __name__ == "__main__":
    out = {}
    for name in sys.argv[1].split(","):
        trainer = run(name, 2)
        assert trainer.accelerator.num_processes == 2
        out[name] = parameters(trainer)
        for parameter in out[name].values():
            other = parameter.clone()
            dist.broadcast(other, 0)
            assert torch.equal(other, parameter), f"{name}: ranks differ"
    if dist.get_rank() == 0:
        torch.save(out, sys.argv[2])
