"""What the engine knows of a run: a small record that the trainer builds once, so that no trainer comes down here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trl_ext.engine.guard import Guard
from trl_ext.engine.tally import LossTally
from trl_ext.plugins.activation import PluginSet


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
    fused_outputs: tuple[str, ...] = ()
    """Outputs that plugins want of the fused head, beside those that TRL's trainer asks for."""
