"""iw-SFT: `-sg[clamp(exp(temperature mean_t(log p - log p_ref)), 0, maximum)] log p` (arXiv 2507.12856).

Each sequence weighs as much more as the model has moved towards it since the reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from trl_ext import hookimpl
from trl_ext.options import Range
from trl_ext.schedules import Scheduled
from trl_ext_objectives.reference_objective import ReferenceObjective

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import TokenRecord


def sequence_weights(
    log_probs: Tensor, reference: Tensor, mask: Tensor, sample_index: Tensor, temperature: float, maximum: float
) -> Tensor:
    """`clamp(exp(temperature x mean_t(log p - log p_ref)), 0, maximum)` of each token's sequence (arXiv 2507.12856).

    Args:
        log_probs, reference: (B, T) float.
        mask: (B, T) bool.
        sample_index: (B, T) long, the sequence of each token, from 0.

    Returns:
        (B, T) float, without gradient.
    """
    gained = ((log_probs.detach() - reference) * mask).flatten()
    index = sample_index.flatten()
    sums = gained.new_zeros(index.numel() + 1).scatter_add(0, index, gained)  # as many samples as tokens, at most
    counts = gained.new_zeros(index.numel() + 1).scatter_add(0, index, mask.flatten().to(gained.dtype))
    mean = sums / counts.clamp(min=1)
    return (temperature * mean).exp().clamp(0, maximum)[sample_index]


@dataclass(eq=False)
class IwSFT(ReferenceObjective):
    """Importance-weighted SFT.

    Args:
        reference: `start`, `base`, `model:PATH` or `cache:PATH`; see `trl_ext_objectives.reference`.
        temperature: Sharpness of the weights, or a schedule.
        maximum: Largest weight.
    """

    citation: ClassVar[str] = "Supervised Fine Tuning on Curated Data is Reinforcement Learning, arXiv 2507.12856"

    reference: str = "start"
    temperature: Annotated[Scheduled, Range(gt=0)] = 1.0
    maximum: Annotated[float, Range(gt=0)] = 16.0

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T) in nats, at least 0 and at most `maximum` times NLL (arXiv 2507.12856).

        The core's denominator is all label tokens of the window.
        """
        reference = self.reference_log_probs(tokens)
        temperature = self.now("temperature", tokens)
        index = tokens.sample_index
        weights = sequence_weights(tokens.log_probs, reference, tokens.mask, index, temperature, self.maximum)
        return -weights * tokens.log_probs
