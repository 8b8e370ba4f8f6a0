"""Records of one optimiser step, of every trainer: auxiliary losses, gradients of streams, weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trl_ext.gradients import GradientView


@dataclass(frozen=True)
class AuxiliaryLoss:
    """A term to add to the loss (`auxiliary_losses`): a numerator on this rank, and what it is per.

    The core divides so that the window's total is the mean per label token ("token") or per sample ("sequence") over
    all ranks, or the mean of the micro-batches' values ("batch"). A window's label tokens are not known while some of
    its completions are still to be generated: a GRPO or RLOO run whose `steps_per_generation` is no multiple of
    `gradient_accumulation_steps` refuses "token".
    """

    value: Tensor
    """() float, differentiable: a sum over tokens or samples, or the batch's value. Include any coefficient."""
    per: Literal["token", "sequence", "batch"]


@dataclass(frozen=True)
class MicroStep:
    """One micro-step's batch and outputs (`auxiliary_losses`)."""

    inputs: Mapping[str, Any]
    log_probs: Tensor
    """(B, T) float, differentiable."""
    entropy: Tensor
    """(B, T) float; differentiable in SFT, DPO and KTO."""
    mask: Tensor
    """(B, T) bool."""
    step: int
    progress: float
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """SFT: the columns that plugins declare, as `TokenRecord.columns` has them (new in 1.4)."""


@dataclass(frozen=True)
class StreamGradient:
    """What one stream's forward and backward gave, reduced over ranks."""

    gradients: GradientView
    nll: float
    """Mean negative log-likelihood per label token over all ranks."""
    loss: float
    """Mean of the objective per label token over all ranks; equals `nll` without an objective plugin."""
    tokens: int
    """Label tokens over all ranks."""


@dataclass(frozen=True)
class WeightsView:
    """Parameters and buffers of the model, in a fixed order; shards under FSDP2 and ZeRO-3 (`weights_updated`)."""

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    """The trainable parameters; each tied weight once. Under ZeRO-3, flat DTensors over the model's memory."""
    buffers: Mapping[str, Tensor]
    sharded: bool

    def local(self) -> list[Tensor]:
        """The parameters' local tensors, sharing memory with the model, outside of autograd."""
        from trl_ext.gradients import local_tensor

        return [local_tensor(p.detach()) for p in self.parameters]
