"""SIGTERM of a scheduler, with transformers' `enable_jit_checkpoint`: all ranks save at the same step, and stop.

transformers saves on each rank by itself, wherever in a step that rank happens to be: ranks would wait for one another
in other places, and a checkpoint amid a step would hold streams and rollouts that are ahead of the weights. So its
request is taken from it here, and agreed on at the end of a step, where checkpoints are as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback


class StopWhereAsked(TrainerCallback):
    """Saves a checkpoint and ends the training after a step in which any rank got SIGTERM.

    Args:
        callbacks: those of the trainer, with transformers' own for this signal among them.
        on_any_rank: whether a flag is set on any rank; collective.
    """

    def __init__(self, callbacks: list[Any], on_any_rank: Callable[[bool], bool]) -> None:
        self._asked = False
        self._on_any_rank = on_any_rank
        for callback in callbacks:
            if isinstance(callback, JITCheckpointCallback) and callback.jit_manager is not None:
                callback.jit_manager._enable_checkpoint = self._ask

    def _ask(self) -> None:
        self._asked = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._asked = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._on_any_rank(self._asked):
            control.should_save = control.should_training_stop = True
