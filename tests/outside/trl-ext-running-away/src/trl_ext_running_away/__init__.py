"""A projection against a running mean of the gradient of general data (after A-GEM, arXiv 1812.00420, equation 11)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch

from trl_ext import hookimpl
from trl_ext.gradients import GradientView
from trl_ext.options import Range
from trl_ext.records import StreamRequest


@dataclass(eq=False)
class RunningAway:
    """Remove from the gradient what points against a running mean of the gradient of the stream "general".

    Args:
        decay: of the running mean; 0 is A-GEM, which takes the gradient of the step alone.
        batch_size: rows of the stream a step and rank.
    """

    requires_api: ClassVar[str] = "1"
    citation: ClassVar[str] = "Chaudhry et al., Efficient lifelong learning with A-GEM, arXiv:1812.00420"
    cost: ClassVar[str] = "a forward and backward of the stream, and one copy of the gradient"
    state_per_rank: ClassVar[bool] = True  # a rank keeps the mean of its shard

    decay: Annotated[float, Range(ge=0, lt=1)] = 0.9
    batch_size: Annotated[int, Range(ge=1)] = 4

    @hookimpl
    def streams(self):
        return [StreamRequest("general", batch_size=self.batch_size)]

    @hookimpl
    def setup(self, context):
        zeros = [torch.zeros_like(w) for w in context.weights.local()]
        self.mean = GradientView(context.weights.names, context.weights.parameters, zeros)

    @hookimpl
    def gradients_ready(self, gradients, streams):
        """g <- g - min(g.m, 0) / |m|^2 m, with m <- decay m + (1 - decay) g_general."""
        self.mean.mul_(self.decay).axpy_(1 - self.decay, streams["general"].gradients)
        against = gradients.dot(self.mean).clamp(max=0)
        self.share = float(against / (gradients.norm() * self.mean.norm()).clamp(min=1e-30))
        gradients.axpy_(-against / self.mean.squared_norm().clamp(min=1e-30), self.mean)

    @hookimpl
    def metrics(self, mode):
        return {"cosine_removed": self.share} if mode == "train" else {}

    def state_dict(self) -> dict[str, Any]:
        return dict(zip(self.mean.names, self.mean.tensors, strict=True))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, tensor in zip(self.mean.names, self.mean.tensors, strict=True):
            tensor.copy_(state[name])
