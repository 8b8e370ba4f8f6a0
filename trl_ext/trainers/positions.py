"""Where a resumed run begins: not at all if it had reached its end, and at the right row of a streaming data set."""

from __future__ import annotations

from typing import Any

from datasets import IterableDataset

from trl_ext.trainers.base import Opened


class PositionMixin(Opened):
    """Wraps one pass over the training data.

    transformers counts the rows of a streaming data set from the beginning of its first pass, which it could only do
    with the number of rows of a pass. Here the pass and the rows drawn in it are counted, and kept in checkpoints.
    """

    _ext_pass: int = 0
    """The pass at hand."""
    _ext_drawn: int = 0
    """Batches that every rank has drawn in it."""
    _ext_resumed: tuple[int, int] | None = None
    """Pass and batches of the checkpoint that the run resumed from; None without one."""

    def _run_epoch(self, **arguments: Any) -> None:
        if self.state.global_step >= self.state.max_steps or self.ext_step.out_of_data:
            self.control.should_training_stop = True  # transformers looks at it after a step, so would take one more
            return
        if isinstance(self.train_dataset, IterableDataset) and self._ext_resumed is not None:
            arguments = self._ext_at_position(arguments, *self._ext_resumed)
        self._ext_pass, self._ext_drawn = arguments["epoch"], 0
        if arguments["epoch"] == arguments["epochs_trained"]:
            self._ext_drawn = arguments["steps_trained_in_current_epoch"]
        super()._run_epoch(**arguments)

    @staticmethod
    def _ext_at_position(arguments: dict[str, Any], passed: int, drawn: int) -> dict[str, Any]:
        """The arguments of a pass, moved by the passes that the interrupted run had finished."""
        passes = {name: arguments[name] + passed for name in ("epoch", "epochs_trained")}
        return {**arguments, **passes, "steps_trained_in_current_epoch": drawn}

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        samples, num_items = super().get_batch_samples(*args, **kwargs)
        self._ext_drawn += len(samples)
        return samples, num_items

    def ext_position(self) -> dict[str, int]:
        """The pass, and the rows that all ranks have drawn in it."""
        return {"pass": self._ext_pass, "rows": self._ext_drawn * self._ext_rows_of_a_batch()}

    def ext_load_position(self, position: dict[str, int]) -> None:
        """Go on at a position, also with batches of another size."""
        self._ext_resumed = position["pass"], position["rows"] // self._ext_rows_of_a_batch()

    def _ext_rows_of_a_batch(self) -> int:
        return self.args.per_device_train_batch_size * self.accelerator.num_processes
