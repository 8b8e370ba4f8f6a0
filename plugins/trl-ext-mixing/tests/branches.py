"""The oracle of parallel averaging: two plain optimisers on two copies of the weights, and the mean of their steps."""

from __future__ import annotations

import torch
import transformers
from mixing_runs import Recorder, Vector
from transformers import Adafactor

SCHEDULE = {"lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.1}
"""What a run has to be given to be comparable."""

OPTIMIZERS = {
    "adamw_torch": lambda p, lr: torch.optim.AdamW(p, lr),
    "adamw_torch_fused": lambda p, lr: torch.optim.AdamW(p, lr, fused=True),
    "adafactor": lambda p, lr: Adafactor(p, lr, scale_parameter=False, relative_step=False),
    "sgd": lambda p, lr: torch.optim.SGD(p, lr),
}


class Branch:
    """A plain training of one branch: its own copy of the weights, optimiser and scheduler."""

    def __init__(self, name: str, start: Vector, lr: float, steps: int, max_norm: float) -> None:
        self.parameters = [torch.nn.Parameter(t.clone()) for t in start]
        # As transformers does: norms, the only vectors of this model, are not decayed.
        decayed = [p for p in self.parameters if p.ndim > 1]
        rest = [p for p in self.parameters if p.ndim == 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = OPTIMIZERS[name](groups, lr)
        self.scheduler = transformers.get_scheduler("cosine", self.optimizer, 2, steps)
        self.max_norm = max_norm

    def step(self, theta: Vector, gradient: Vector) -> Vector:
        """The weights after one step from theta."""
        for p, t, g in zip(self.parameters, theta, gradient, strict=True):
            p.data.copy_(t)
            p.grad = g.clone()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        self.optimizer.step()
        self.scheduler.step()
        return [p.detach().clone() for p in self.parameters]


def two_branches(
    name: str, seen: Recorder, steps: int, lr: tuple[float, float], norms: tuple[float, float], c: float = 0.5
) -> list[Vector]:
    """The trajectory of the mean of two one-step branches, driven by the gradients that the run saw."""
    theta = seen.weights[0]
    rl, sft = (Branch(name, theta, lr[i], steps, norms[i]) for i in (0, 1))
    trajectory = [theta]
    for g_rl, g_sft in zip(seen.rl, seen.sft, strict=True):
        a, b = rl.step(theta, g_rl), sft.step(theta, g_sft)
        theta = [(x + y) / 2 if c == 0.5 else (1 - c) * x + c * y for x, y in zip(a, b, strict=True)]
        trajectory.append(theta)
    return trajectory


def largest_difference(a: Vector, b: Vector) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))
