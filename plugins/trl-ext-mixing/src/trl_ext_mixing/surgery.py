"""Gradient surgery for two: the RL and SFT gradients combined by weights that depend on their lengths and angle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trl_ext import hookimpl
from trl_ext.gradients import GradientView
from trl_ext.records import Rewards, Rollouts, StreamGradient
from trl_ext_mixing.comparison import Comparison
from trl_ext_mixing.two_gradients import TwoGradients


def pcgrad_weights(gram: Tensor) -> Tensor:
    """Weights w with w_a a + w_b b = the sum of both gradients, each without its part along the other if a.b < 0.

    Projecting b off a takes (a.b / |a|^2) a away, so a's weight is 1 - a.b / |a|^2 (arXiv:2001.06782, algorithm 1).

    Args:
        gram: (2, 2) inner products of a and b.

    Returns:
        (2,) weights.
    """
    conflict = gram[0, 1].clamp(max=0.0)
    return 1 - conflict / gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny)


def weighting_named(name: str) -> Callable[[Tensor], Tensor]:
    """(2, 2) Gram matrix of the RL and the SFT gradient to (2,) weights; all but `pcgrad` are those of
    trl-ext-data-regularization's `gradient-surgery`, where the RL gradient is in the place of the target's.

    Raises:
        ImportError: that distribution, or torchjd for a weighting of its, is not installed.
        ValueError: there is no such weighting.
    """
    if name == "pcgrad":
        return pcgrad_weights
    try:
        from trl_ext_data_regularization import weightings
    except ImportError as error:
        raise ImportError(
            f"surgery: weighting={name!r} comes with trl-ext-data-regularization: "
            "pip install trl-ext-data-regularization, or use weighting=pcgrad"
        ) from error
    known = (*weightings.CLOSED_FORMS, *weightings.TORCHJD)
    if name not in known:
        raise ValueError(f"surgery: weighting={name!r} is not one of {', '.join(known)}")
    return weightings.weighting(name)


@dataclass(eq=False, kw_only=True)
class Surgery(TwoGradients):
    """A weighted sum of the two gradients under one optimiser, with weights from their Gram matrix.

    Args:
        weighting: `pcgrad`, the sum without what conflicts; with trl-ext-data-regularization installed also
            `half-space`, the RL gradient without what the SFT gradient speaks against, and with torchjd `upgrad`,
            `mgda` and others.
        normalise: bring both gradients to the mean of their norms first. Without it a weight grows with the ratio of
            the norms, which for RL and SFT can be large.
    """

    weighting: str = "pcgrad"
    normalise: bool = True

    method: ClassVar[str] = "surgery"
    citation: ClassVar[str] = "Yu et al., Gradient Surgery for Multi-Task Learning (PCGrad), arXiv:2001.06782"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._weigh = weighting_named(self.weighting)

    @hookimpl
    def advantages(self, rollouts: Rollouts, rewards: Rewards, advantages: Tensor) -> Tensor:
        super().advantages(rollouts, rewards, advantages)
        # Brought to the SFT gradient's norm, the rounding of the advantages would be half of the step.
        if self.no_signal(rollouts, rewards):
            return torch.zeros_like(advantages)
        return advantages

    def mix(self, gradients: GradientView, sft: StreamGradient, both: Comparison) -> None:
        norms = torch.stack([both.norm_a, both.norm_b])
        scales = torch.ones_like(norms)
        if self.normalise and bool((norms > 0).all()):  # reduced over ranks, so all of them take one branch
            scales = norms.mean() / norms
        a, b = norms * scales
        dot = both.cosine * a * b
        weights = self._weigh(torch.stack([torch.stack([a * a, dot]), torch.stack([dot, b * b])]))
        self.note(weight_rl=weights[0], weight_sft=weights[1], conflict=both.cosine < 0)
        rl, demonstrations = (weights * scales).tolist()
        gradients.mul_(rl).axpy_(demonstrations, sft.gradients)
