"""What the engine knows of a run: small records that the trainer builds once, so that no trainer comes down here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trl_ext.engine.guard import Guard
from trl_ext.engine.tally import LossTally
from trl_ext.plugins.plugin_set import PluginSet
from trl_ext.records import Column


@dataclass(frozen=True)
class RunContext:
    """The run as one step sees it. What changes while it trains is a function."""

    plugins: PluginSet
    guard: Guard
    """Calls the plugins' hooks."""
    tally: LossTally
    """Takes the numbers to log."""
    device: torch.device
    world_size: int
    sum_over_ranks: Callable[[Tensor], Tensor]
    training: Callable[[], bool]
    """Whether the model is in training mode; else the run evaluates."""
    step: Callable[[], int]
    """Optimiser steps already done."""
    progress: Callable[[], float]
    """Share of the optimiser steps already done, in [0, 1]."""
    accumulation_steps: Callable[[], int]
    """Micro-batches of the current window; the last window of an epoch may be shorter."""
    samples_marked: Callable[[], bool] = lambda: True
    """Whether the batches of the current mode show where a sample ends (SFT)."""
    fused_outputs: tuple[str, ...] = ()
    """Outputs that plugins want of the fused head, beside those that TRL's trainer asks for."""
    columns: Mapping[str, Column] = field(default_factory=dict)
    """What plugins want of the data beside the tokens, by name."""


@dataclass
class AccumulationWindow:
    """The micro-batches of this rank for one optimiser step, and how far the step has come."""

    micro_batches: Sequence[Any] = ()
    """As the data loader gave them."""
    num_items: Tensor | int | None = None
    """Label tokens of the window over all ranks, as transformers counts them."""
    done: int = 0
    """Micro-steps already done."""
    tokens: Tensor | None = None
    """() float: label tokens of the window over all ranks, where an auxiliary loss may need them (not in SFT)."""
    sequences: Tensor | None = None
    """() float: samples of the window over all ranks, where an auxiliary loss may need them (SFT, DPO, KTO)."""
    column_totals: Mapping[str, Tensor] | None = None
    """What `TokenRecord` has under this name, where plugins declare columns (SFT)."""
    weights: Sequence[Tensor] | None = None
    """(B, T) float per micro-batch: the weight of each label's loss, where a plugin weighs samples (SFT)."""

    def start(self, micro_batches: Sequence[Any], num_items: Tensor | int | None) -> None:
        """Go on to the next window."""
        self.micro_batches, self.num_items, self.done = micro_batches, num_items, 0
        self.tokens = self.sequences = self.column_totals = self.weights = None
