"""Records of start-up: the run as asked for, as prepared, and its auxiliary data sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import nn

    from trl_ext.records.step import WeightsView

TrainerKind = Literal["sft", "grpo", "dpo", "kto", "rloo", "reward", "distillation"]
"""What a run trains with."""
TRAINERS: tuple[TrainerKind, ...] = get_args(TrainerKind)


def trainer_name(kind: str) -> str:
    """A trainer as texts write it: the acronyms in capitals, the words as words."""
    return kind if kind in ("reward", "distillation") else kind.upper()


@dataclass(frozen=True)
class RunDescription:
    """The run as asked for, before the model loads; once more as it is where the loaded model is sharded (`check`)."""

    trainer: TrainerKind
    args: Any
    """The trainer's config (`SFTConfig`, `GRPOConfig`, ...)."""
    model: Any
    """What was passed as the model, an id or path, or a model; the loaded one in a second check."""
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
    """GRPO, RLOO: names of the reward functions; empty where they are not known beforehand (new in 1.2)."""
    low_precision: tuple[str, ...] = ()
    """What to set for passes that compute in the weights' own number format, such as `bf16=False`; empty where they do
    already (new in 1.5)."""


def _nowhere(*_: Any) -> None:
    """What a run without trackers does with a picture or table."""


@dataclass(frozen=True)
class Trackers:
    """Takes pictures and tables to where the trainer logs its numbers: wandb and TensorBoard (new in 1.5).

    May be called in any hook from the first step on, `end` included, on all ranks or on some: the first rank writes, at
    the current step. Begin a name with the plugin's. Where `report_to` names no such tracker, a warning says so once.
    """

    picture: Callable[[str, NDArray[np.uint8]], None] = _nowhere
    """`picture(name, pixels)`, with (height, width, 3) uint8 pixels; a ValueError for others."""
    table: Callable[[str, Sequence[str], Sequence[Sequence[Any]]], None] = _nowhere
    """`table(name, columns, rows)`, with a value for each column in each row; a ValueError otherwise."""


@dataclass(frozen=True)
class SetupContext:
    """The model as it will be trained, and facts of the run (`setup`)."""

    trainer: TrainerKind
    model: nn.Module
    """The unwrapped model; its parameters are DTensors under FSDP2, and empty or whole under ZeRO-3."""
    weights: WeightsView
    names: tuple[str, ...]
    """Names of the trainable parameters, in the order of every view."""
    device: torch.device
    rank: int
    world_size: int
    sharded: bool
    """Whether each rank holds a shard of the parameters, of frozen ones too (FSDP2, ZeRO-3): a forward takes all ranks
    then."""
    gradient_accumulation_steps: int
    max_steps: int
    output_dir: str
    resuming: bool
    """Whether the run continues from a checkpoint; `load_state_dict` follows `setup` then."""
    tokenizer: Any
    reference: nn.Module | None = None
    """GRPO, RLOO, DPO, KTO: the unwrapped reference model, where the trainer keeps one beside the policy."""
    trackers: Trackers = field(default_factory=Trackers)
    """Takes pictures and tables, from the first step on (new in 1.5)."""


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
