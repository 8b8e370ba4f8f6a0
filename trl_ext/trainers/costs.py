"""The callback that writes down what a training takes, where whoever started it has asked for it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from trl_ext.jobs.costs import Costs, append_costs, tokens_at


class CostCallback(TrainerCallback):
    """Appends a line to a file whenever the training logs or is about to save, and at its end; it changes nothing.

    Args:
        path: The file.
        counted: Tokens that the trainer has counted, which plain TRL forgets when it resumes.
    """

    def __init__(self, path: Path, counted: Callable[[], int]) -> None:
        self.path = path
        self.counted = counted
        self.forgotten = 0
        self.attempt = time.time()
        self.started = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()
        self.forgotten = tokens_at(self.path, state.global_step) - self._tokens(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:  # before the checkpoint is there, so that whatever resumes from it finds the line
            self._write(state)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write(state)

    def _write(self, state: Any) -> None:
        if state.is_world_process_zero:
            tokens = self.forgotten + self._tokens(state)
            seconds = time.perf_counter() - self.started
            append_costs(self.path, self.attempt, Costs(seconds, state.global_step, tokens, peak_memory()))

    def _tokens(self, state: Any) -> int:
        return int(self.counted() or state.num_input_tokens_seen)  # the latter is where GRPO counts


def peak_memory() -> int:
    """Bytes: what torch has allocated at most on this rank's accelerator, or the most that this process has held."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    import resource  # not there on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # of `ru_maxrss`
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
