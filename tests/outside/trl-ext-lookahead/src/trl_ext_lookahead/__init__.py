"""Lookahead (arXiv 1907.08610, algorithm 1): every k steps the weights go back part of the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch

from trl_ext import hookimpl
from trl_ext.gradients import local_tensor
from trl_ext.options import Range

HEIGHT, WIDTH = 64, 8
"""Pixels of the picture, the width that of a bar."""


class LookaheadOptimizer(torch.optim.Optimizer):
    """Any optimiser with slow weights beside it, in its state: phi <- phi + alpha (theta - phi), theta <- phi.

    Args:
        inner: makes the fast steps; its groups and its state are this one's too.
        k: fast steps for each slow one.
        alpha: how far the slow weights go, in (0, 1].
    """

    def __init__(self, inner: torch.optim.Optimizer, k: int, alpha: float) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.k, self.alpha = inner, k, alpha
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        # Adam takes a state that is not empty for its own, so slow weights go in after its first step.
        start = {p: p.detach().clone() for p in trained if "slow" not in self.state.get(p, {})}
        result = self.inner.step(closure)
        for p in trained:
            state = self.state[p]
            state.setdefault("slow", start.get(p))
            state["fast_steps"] = state.get("fast_steps", 0) + 1
            if state["fast_steps"] % self.k == 0:
                state["slow"].lerp_(p, self.alpha)
                p.copy_(state["slow"])
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)
        self._share()


@dataclass(eq=False)
class Lookahead:
    """Put Lookahead around the optimiser that the trainer's arguments choose.

    Args:
        k: fast steps for each slow one.
        alpha: how far the slow weights go.
    """

    requires_api: ClassVar[str] = "1"
    citation: ClassVar[str] = "Zhang et al., Lookahead Optimizer: k steps forward, 1 step back, arXiv:1907.08610"
    cost: ClassVar[str] = "one copy of the weights"

    k: Annotated[int, Range(ge=1)] = 5
    alpha: Annotated[float, Range(gt=0, le=1)] = 0.5

    @hookimpl
    def wrap_optimizer(self, optimizer):
        self.optimizer = LookaheadOptimizer(optimizer, self.k, self.alpha)
        return self.optimizer

    @hookimpl
    def setup(self, context):
        self.trackers = context.trackers

    @hookimpl
    def metrics(self, mode):
        """How far the weights are from the slow ones."""
        distances = self.distances()
        return {"distance": distances.norm()} if mode == "train" and len(distances) else {}

    @hookimpl
    def end(self):
        """A bar for each parameter: its distance from the slow weights, against the largest."""
        distances = self.distances()
        heights = (HEIGHT * distances / distances.max().clamp(min=1e-30)).cpu()
        filled = torch.arange(HEIGHT, 0, -1).unsqueeze(1) <= heights
        bars = (255 * filled).to(torch.uint8).repeat_interleave(WIDTH, dim=1)
        self.trackers.picture("lookahead/distances", bars.unsqueeze(2).expand(-1, -1, 3).numpy())

    def distances(self) -> torch.Tensor:
        """(P,) float: the distance of each parameter from its slow weights, local shards under FSDP2."""
        states = [(p.detach(), s["slow"]) for p, s in self.optimizer.state.items() if "slow" in s]
        if not states:
            return torch.zeros(0)
        return torch.stack([local_tensor(p - slow).norm() for p, slow in states])
