"""The conformance kit: a sound plugin passes every case, and each case finds a plugin that is broken in its way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trl_ext import hookimpl
from trl_ext.records import StreamRequest

# -- plugins that are as they should be -------------------------------------------------------------------------------


@dataclass(eq=False)
class Focal:
    gamma: float = 2.0

    @hookimpl
    def per_token_loss(self, tokens):
        return -((1 - tokens.probs) ** self.gamma) * tokens.log_probs


def focal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    p = logits.softmax(-1).gather(-1, labels[:, None])[:, 0]
    return -((1 - p) ** 2) * p.log()


@dataclass(eq=False)
class Average:
    """A running mean of the weights, with a state; also as what it is evaluated with."""

    decay: float = 0.5

    @hookimpl
    def setup(self, context):
        self.mean = [w.float() for w in context.weights.local()]

    @hookimpl
    def weights_updated(self, weights):
        for mean, w in zip(self.mean, weights.local(), strict=True):
            mean.lerp_(w.float(), 1 - self.decay)

    @hookimpl
    @contextmanager
    def deployed_weights(self, weights) -> Iterator[None]:
        kept = [w.clone() for w in weights.local()]
        torch._foreach_copy_(weights.local(), self.mean)
        yield
        torch._foreach_copy_(weights.local(), kept)

    def state_dict(self) -> dict[str, Any]:
        return {f"{i}": mean for i, mean in enumerate(self.mean)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = list(state.values())


@dataclass(eq=False)
class SofterNegatives:
    """GRPO: scales negative advantages down."""

    scale: float = 0.5

    @hookimpl
    def advantages(self, advantages):
        return torch.where(advantages < 0, self.scale * advantages, advantages)


@dataclass(eq=False)
class Away:
    """Removes from the gradient what points against that of a stream."""

    @hookimpl
    def streams(self):
        return [StreamRequest("general", batch_size=2)]

    @hookimpl
    def gradients_ready(self, gradients, streams):
        general = streams["general"].gradients
        gradients.axpy_(-gradients.dot(general) / general.squared_norm(), general)


FAST = {"options_in_config", "changes_something", "state_survives_json", "cost"}
