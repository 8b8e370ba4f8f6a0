"""Gradient surgery between RL and SFT (PCGrad, arXiv:2001.06782, algorithm 1), under one optimiser.

    g <- w_RL a + w_SFT b,    a, b = g_RL and g_SFT, both brought to the mean of their norms
    w_RL = 1 - min(0, a.b) / |a|^2,    w_SFT = 1 - min(0, a.b) / |b|^2

Without a conflict (a.b >= 0) it is the sum of both; with one, each loses its part along the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from trl_ext import hookimpl
from trl_ext.errors import ConfigurationError
from trl_ext.gradients import GradientView, pcgrad_weights
from trl_ext.records import Rewards, Rollouts, RunDescription, StreamGradient
from trl_ext_mixing.comparison import Comparison
from trl_ext_mixing.two_gradients import TwoGradients


@dataclass(eq=False, kw_only=True)
class Surgery(TwoGradients):
    """A weighted sum of the two gradients under one optimiser, with weights from their Gram matrix.

    Args:
        weighting: `pcgrad`, the sum without what conflicts; the others are those of `gradient-surgery` in
            trl-ext-data-regularization, which has to be installed, with the RL gradient in the place of the target's:
            `half-space`, the RL gradient without what the SFT gradient speaks against, and with torchjd the rest.
        normalise: bring both gradients to the mean of their norms first. Without it a weight grows with the ratio of
            the norms, which for RL and SFT can be large.
    """

    weighting: Literal["pcgrad", "half-space", "upgrad", "mgda", "dualproj", "imtl-g", "aligned-mtl", "mean", "sum"] = (
        "pcgrad"
    )
    normalise: bool = True

    method: ClassVar[str] = "surgery"
    citation: ClassVar[str] = "Yu et al., Gradient Surgery for Multi-Task Learning (PCGrad), arXiv:2001.06782"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._weigh: Callable[[Tensor], Tensor] = pcgrad_weights

    def mix(self, gradients: GradientView, sft: StreamGradient, both: Comparison) -> None:
        """g <- w_RL a + w_SFT b, by norms and cosine alone."""
        norms = torch.stack([both.norm_a, both.norm_b])
        scales = torch.ones_like(norms)
        if self.normalise:  # where one of the two is zero, no scale brings it to the other
            scales = torch.where((norms > 0).all(), norms.mean() / norms, scales)
        a, b = norms * scales
        dot = both.cosine * a * b
        weights = self._weigh(torch.stack([torch.stack([a * a, dot]), torch.stack([dot, b * b])]))
        self.note(weight_rl=weights[0], weight_sft=weights[1], conflict=both.cosine < 0)
        rl, demonstrations = (weights * scales).tolist()
        gradients.mul_(rl).axpy_(demonstrations, sft.gradients)

    @hookimpl
    def check(self, run: RunDescription) -> None:
        super().check(run)
        if self.weighting != "pcgrad":
            self._weigh = weighting_of_data_regularization(self.weighting)

    @hookimpl
    def advantages(self, rollouts: Rollouts, rewards: Rewards, advantages: Tensor) -> Tensor:
        super().advantages(rollouts, rewards, advantages)
        # Brought to the SFT gradient's norm, the rounding of the advantages would be half of the step.
        if self.no_signal(rollouts, rewards):
            return torch.zeros_like(advantages)
        return advantages


def weighting_of_data_regularization(name: str) -> Callable[[Tensor], Tensor]:
    """(2, 2) Gram matrix of the RL and the SFT gradient to (2,) weights, from trl-ext-data-regularization.

    Raises:
        ConfigurationError: that distribution, or torchjd for a weighting of its, is not installed.
    """
    try:
        from trl_ext_data_regularization.weightings import weighting
    except ImportError as error:
        raise ConfigurationError(
            f"surgery: weighting={name!r} comes with trl-ext-data-regularization: "
            "pip install trl-ext-data-regularization, or use weighting=pcgrad"
        ) from error
    try:
        return weighting(name)
    except ImportError as error:
        raise ConfigurationError(f"surgery: {error}; or use weighting=pcgrad") from error
