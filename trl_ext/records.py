"""What hooks receive and return: small frozen records, with tensors on the training device.

Shapes: B rows of a micro-batch, T label positions (one less than the sequence length, since labels are shifted). Under
padding-free training B is 1 and T runs over all samples of the micro-batch; `sample_index` says which token is whose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from trl_ext.gradients import GradientView

TrainerKind = Literal["sft", "grpo"]
"""What a run trains with."""
TRAINERS: tuple[TrainerKind, ...] = get_args(TrainerKind)


@dataclass(frozen=True)
class RunDescription:
    """The run as asked for, before the model loads (`check`)."""

    trainer: TrainerKind
    args: Any
    """The trainer's config (`SFTConfig` or `GRPOConfig`)."""
    model: Any
    """What was passed as the model: an id or path, or a model."""
    plugins: tuple[str, ...]
    """Names of the active plugins, in order."""
    streams: tuple[str, ...]
    """Names of the auxiliary data sets that were given."""
    columns: tuple[str, ...]
    """Columns of the training data set; empty where they are not known."""
    peft: bool
    world_size: int
    sharding: Literal["none", "ddp", "fsdp1", "fsdp2", "deepspeed"]
    rewards: tuple[str, ...] = ()
    """GRPO: names of the reward functions; empty where they are not known beforehand (new in 1.2)."""


@dataclass(frozen=True)
class SetupContext:
    """The model as it will be trained, and facts of the run (`setup`)."""

    trainer: TrainerKind
    model: nn.Module
    """The unwrapped model; its parameters are DTensors under FSDP2."""
    weights: WeightsView
    names: tuple[str, ...]
    """Names of the trainable parameters, in the order of every view."""
    device: torch.device
    rank: int
    world_size: int
    sharded: bool
    """Whether each rank holds a shard of the parameters (FSDP2)."""
    gradient_accumulation_steps: int
    max_steps: int
    output_dir: str
    resuming: bool
    """Whether the run continues from a checkpoint; `load_state_dict` follows `setup` then."""
    tokenizer: Any
    reference: nn.Module | None = None
    """GRPO: the unwrapped reference model of the KL term, where the trainer keeps one beside the policy."""


@dataclass(frozen=True)
class StreamRequest:
    """One auxiliary data set that a plugin wants (`streams`).

    Each optimiser step draws one batch of `batch_size` samples per rank, and hands its gradient to the plugin. `when`
    is "before" (ready in `sample_weights`) or "after" the main backward (ready in `gradients_ready`). `on_exhausted`:
    "cycle" reshuffles and starts again, "stop" ends the training after the step, "error" raises.
    """

    role: str
    batch_size: int = 8
    when: Literal["before", "after"] = "after"
    on_exhausted: Literal["cycle", "stop", "error"] = "cycle"
    shuffle: bool = True
    seed: int | None = None
    """Seed of the order; the trainer's `data_seed` or `seed` where None."""
    max_length: int | None = None
    """Longest sequence in tokens; the trainer's `max_length` where None."""
    optional: bool = False
    """Whether the run may go on without a data set for this role."""
    select: Callable[[], Sequence[int]] | None = None
    """Gives the rows of this rank's next batch, in place of the seeded order; none at all is allowed. For data that
    belongs to the step, such as demonstrations of the prompts just rolled out. `batch_size` is not used then."""
    keep: bool = True
    """With when="before": whether the gradient is still there in `gradients_ready`. Where it is not, its memory is free
    during the window's own passes (new in 1.1)."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: a stream draws at least one sample per rank")
        for name, value, allowed in (
            ("when", self.when, ("before", "after")),
            ("on_exhausted", self.on_exhausted, ("cycle", "stop", "error")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}")
        if not self.keep and self.when == "after":
            raise ValueError("keep=False: a gradient taken after the main backward is there for gradients_ready alone")


@dataclass(frozen=True)
class TokenRecord:
    """The label tokens of one SFT micro-batch or stream batch (`per_token_loss`)."""

    log_probs: Tensor
    """(B, T) float, differentiable: log-probability of each label; 0 where `mask` is False."""
    entropy: Tensor
    """(B, T) float, differentiable: entropy of the next-token distribution in nats."""
    mask: Tensor
    """(B, T) bool: whether the position has a label."""
    training: bool
    denominator: Tensor
    """() float: what the sum of this micro-batch's losses on this rank is divided by, so that averaging over ranks
    and adding over the window gives the mean over all label tokens of the window."""
    accumulation_steps: int
    """Micro-batches in this window; 1 in evaluation and in streams."""
    progress: float
    """Share of the optimiser steps already done, in [0, 1]."""
    stream: str | None = None
    """Name of the stream, or None for the trainer's own data."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """(B, T) each: the outputs named in the plugin's `fused_outputs` ("log_sum_sq_probs", "mean_logits", "is_top1"),
    without gradient."""
    reference_log_probs: Tensor | None = None
    """(B, T) float: log-probabilities of the labels under a reference that the trainer has; TRL's SFT has none, so
    an objective asks a reference of its own where this is None."""
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    """The micro-batch as the model received it."""

    @cached_property
    def probs(self) -> Tensor:
        """(B, T) float in [0, 1], differentiable: probability p of each label; 1 where `mask` is False."""
        return self.log_probs.exp()

    @cached_property
    def one_minus_probs(self) -> Tensor:
        """(B, T) float in [0, 1], differentiable: 1 - p, exact where p is close to 1; 0 where `mask` is False."""
        from trl_ext.numerics import one_minus_exp

        return one_minus_exp(self.log_probs)

    @cached_property
    def sample_index(self) -> Tensor:
        """(B, T) long: the sample of the micro-batch that each label belongs to, counted from 0.

        Rows are samples, except under padding-free training, where a position id of 0 starts the next sample; zeros at
        the very end are padding and count with the last one.
        """
        import torch

        rows, width = self.log_probs.shape
        position_ids = self.inputs.get("position_ids")
        if position_ids is None or "attention_mask" in self.inputs:
            return torch.arange(rows, device=self.mask.device).unsqueeze(1).expand(rows, width)
        flat = position_ids.flatten()
        before_padding = (flat != 0).flip(0).cumsum(0).flip(0) > 0
        starts = ((flat == 0) & before_padding).cumsum(0) - 1
        return starts.clamp(min=0).view(position_ids.shape)[:, 1:]

    @cached_property
    def num_samples(self) -> int:
        """Samples in the micro-batch."""
        return int(self.sample_index[-1, -1]) + 1


@dataclass(frozen=True)
class Window:
    """One accumulation window of this rank, before its first forward (`sample_weights`)."""

    micro_batches: Sequence[Mapping[str, Tensor]]
    """The prepared micro-batches; do not edit."""
    sample_index: Sequence[Tensor]
    """(B, T) long per micro-batch, counted from 0 over the whole window of this rank."""
    num_samples: int
    step: int
    """Optimiser steps already done."""
    streams: Mapping[str, StreamGradient]
    """Gradients of the streams asked for with when="before"."""
    forward: Callable[[int], TokenRecord]
    """Forward of micro-batch i without side effects: no counter, metric or random state of the trainer moves."""
    per_token_loss: Callable[[int], Tensor]
    """(B, T) the active objective's loss of micro-batch i (plain NLL without one), on this rank and without side
    effects; 0 without a label."""
    gradient: Callable[[int, Tensor | None], GradientView]
    """Reduced gradient of micro-batch i's loss, its samples weighted by the second argument (num_samples,), without
    side effects and without touching `p.grad`; every rank must call it alike."""


@dataclass(frozen=True)
class SampleWeights:
    """Weights of a window's samples, with the denominator they go with (`sample_weights`)."""

    weights: Tensor
    """(num_samples,) float, in the order of the window."""
    denominator: Literal["weighted", "tokens"] = "weighted"
    """"weighted": divide by the sum over ranks of weight x label tokens (the token mean over the kept samples);
    "tokens": divide by all label tokens of the window, as plain TRL does."""


@dataclass(frozen=True)
class Rollouts:
    """This rank's completions (`advantages`). N rows: the generation batch in training, the batch in evaluation."""

    inputs: Sequence[Mapping[str, Any]]
    """N rows of the data set, prompts repeated once per generation."""
    prompts: Sequence[Any]
    completions: Sequence[Any]
    """Text, or messages for conversational data."""
    prompt_ids: Tensor
    """(N, P) long, padded on the left."""
    prompt_mask: Tensor
    """(N, P) 0/1."""
    completion_ids: Tensor
    """(N, T) long, padded on the right."""
    mask: Tensor
    """(N, T) 0/1: the tokens that the loss sees (tool results and masked truncated completions are 0)."""
    num_generations: int
    step: int
    """Optimiser steps already done."""
    training: bool
    old_log_probs: Tensor | None = None
    """(N, T) float, where TRL computed them."""


@dataclass(frozen=True)
class Rewards:
    """Rewards of all ranks (`advantages`)."""

    per_function: Tensor
    """(N x ranks, F) float; NaN where a function returned None."""
    names: tuple[str, ...]
    weights: Tensor
    """(F,) float."""
    local: slice
    """The rows of this rank."""

    @property
    def total(self) -> Tensor:
        """(N x ranks,) float: weighted sum over the functions, NaN ignored."""
        return (self.per_function * self.weights.to(self.per_function.device)).nansum(dim=1)


@dataclass(frozen=True)
class PolicyTokens:
    """One GRPO micro-batch (`policy_loss`)."""

    log_probs: Tensor
    """(B, T) float, differentiable, at the trainer's temperature."""
    old_log_probs: Tensor
    """(B, T) float: of the policy that generated; `log_probs` detached on policy."""
    advantages: Tensor
    """(B, T) float."""
    mask: Tensor
    """(B, T) bool."""
    entropy: Tensor
    """(B, T) float, in nats."""
    training: bool
    progress: float
    reference_log_probs: Tensor | None = None
    """(B, T) float, where the trainer has a reference (`beta` > 0)."""


@dataclass(frozen=True)
class AuxiliaryLoss:
    """A term to add to the loss (`auxiliary_losses`): a numerator on this rank, and what it is per.

    The core divides so that the window's total is the mean per label token ("token") or per sample ("sequence") over
    all ranks, or the mean of the micro-batches' values ("batch").
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
    """(B, T) float; differentiable in SFT."""
    mask: Tensor
    """(B, T) bool."""
    step: int
    progress: float


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
    """Parameters and buffers of the model, in a fixed order; local shards under FSDP2 (`weights_updated`)."""

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    """The trainable parameters; each tied weight once."""
    buffers: Mapping[str, Tensor]
    sharded: bool

    def local(self) -> list[Tensor]:
        """The parameters' local tensors, sharing memory with the model, outside of autograd."""
        from trl_ext.gradients import local_tensor

        return [local_tensor(p.detach()) for p in self.parameters]
