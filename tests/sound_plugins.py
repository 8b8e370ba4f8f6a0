"""Plugins that are as they should be, one of each kind, for the tests of the conformance kit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trl_ext import hookimpl
from trl_ext.records import StreamRequest


@dataclass(eq=False)
class Focal:
    """An objective."""

    gamma: float = 2.0

    @hookimpl
    def per_token_loss(self, tokens):
        return -((1 - tokens.probs) ** self.gamma) * tokens.log_probs


def focal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The same, from the logits."""
    p = logits.softmax(-1).gather(-1, labels[:, None])[:, 0]
    return -((1 - p) ** 2) * p.log()


@dataclass(eq=False)
class Average:
    """A running mean of the weights in fp32, to evaluate and save with; it has a state."""

    decay: float = 0.5

    @hookimpl
    def setup(self, context):
        self.mean = [w.float().clone() for w in context.weights.local()]

    @hookimpl
    def weights_updated(self, weights):
        for mean, w in zip(self.mean, weights.local(), strict=True):
            mean.lerp_(w.float(), 1 - self.decay)

    @hookimpl
    @contextmanager
    def deployed_weights(self, weights) -> Iterator[None]:
        kept = [w.clone() for w in weights.local()]
        for w, mean in zip(weights.local(), self.mean, strict=True):
            w.copy_(mean)
        yield
        for w, raw in zip(weights.local(), kept, strict=True):
            w.copy_(raw)

    def state_dict(self) -> dict[str, Any]:
        return {f"{i}": mean for i, mean in enumerate(self.mean)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = [state[f"{i}"] for i in range(len(state))]


@dataclass(eq=False)
class Away:
    """Removes from the gradient what points along that of a stream, without a bound."""

    @hookimpl
    def streams(self):
        return [StreamRequest("general", batch_size=2)]

    @hookimpl
    def gradients_ready(self, gradients, streams):
        general = streams["general"].gradients
        gradients.axpy_(-gradients.dot(general) / general.squared_norm(), general)


@dataclass(eq=False)
class SofterNegatives:
    """GRPO: scales negative advantages down."""

    scale: float = 0.5

    @hookimpl
    def advantages(self, advantages):
        return torch.where(advantages < 0, self.scale * advantages, advantages)
