"""The moments of a step that transformers offers only to callbacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from trl_ext.engine.step import OptimizerStep


class StepCallback(TrainerCallback):
    """Goes on with a step after the optimiser.

    Args:
        step: the run's.
        skipped: whether accelerate left the optimiser's step out.
        rank_check_steps: optimiser steps between comparisons of ranks; 0 for none.
    """

    def __init__(self, step: OptimizerStep, skipped: Callable[[], bool], rank_check_steps: int) -> None:
        self.step = step
        self.skipped = skipped
        self.rank_check_steps = rank_check_steps

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step.weights_updated(self.skipped())
        if self.step.out_of_data:
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        every = self.rank_check_steps
        if every and self.step.run.world_size > 1 and state.global_step % every == 0:
            self.step.compare_ranks()
