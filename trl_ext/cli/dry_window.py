"""One accumulation window of a run, forward and backward, without an optimiser step and without a file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from transformers import TrainerCallback

from trl_ext.cli.faults import explain_faults
from trl_ext.cli.patching import PLACES
from trl_ext.cli.train import Settings
from trl_ext.errors import ConfigurationError
from trl_ext.records import TrainerKind


class WindowDone(Exception):
    """The window is through; the optimiser would step now."""


class StopBeforeStep(TrainerCallback):
    """Leaves the training loop between the window's last backward and the optimiser."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise WindowDone


def dry_window(kind: TrainerKind, settings: Settings) -> int:
    """Run TRL's script up to the first optimiser step, in a folder that vanishes.

    Args:
        kind: The training command.
        settings: TRL's settings; they are changed.

    Returns:
        The number of samples of the window, over all ranks.

    Raises:
        ConfigurationError: The run would fail for what its user can mend.
    """
    training_args = settings[1]
    with tempfile.TemporaryDirectory() as folder, _stopping(kind):
        training_args.output_dir = folder
        training_args.resume_from_checkpoint = None
        training_args.report_to, training_args.push_to_hub, training_args.eval_on_start = [], False, False
        try:
            with explain_faults(training_args, settings[2]):
                import_module(f"trl.scripts.{kind}").main(*settings)
        except WindowDone:
            return training_args.train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size
    raise ConfigurationError(f"no optimiser step came: max_steps={training_args.max_steps}, or the data has no window")


@contextmanager
def _stopping(kind: str) -> Iterator[None]:
    """A context in which TRL's script makes trainers that stop before their first step."""
    import trl

    name = next(name for name in PLACES if name.lower() == f"{kind}trainer")
    ours = getattr(trl, name)

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(StopBeforeStep())
        return ours.train(self, *args, **kwargs)

    setattr(trl, name, type(name, (ours,), {"train": train}))
    try:
        yield
    finally:
        setattr(trl, name, ours)
