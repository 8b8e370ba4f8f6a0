"""`trl-ext validate`: every check of a run and one window of its data, without an optimiser step and without a file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from transformers import TrainerCallback

from trl_ext.cli.ending import held_warnings
from trl_ext.cli.faults import explain_faults
from trl_ext.cli.patching import PLACES
from trl_ext.cli.settings import CONFIG, config_path, known_settings, read_yaml
from trl_ext.cli.train import Settings, announce, check, make_parser, read
from trl_ext.errors import ConfigurationError
from trl_ext.records import TRAINERS, TrainerKind

USAGE = """Usage: trl-ext validate [KIND] --config FILE [SETTINGS]...

  Check a training configuration as `trl-ext KIND` would, build its trainer, and
  run one accumulation window forward and backward: no optimiser step, no file.

  KIND is {kinds}; left out, it is the one whose settings FILE has.
  SETTINGS are flags of the training command, and override FILE."""


class WindowDone(Exception):
    """The window is through; the optimiser would step now."""


class StopBeforeStep(TrainerCallback):
    """Leaves the training loop between the window's last backward and the optimiser."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise WindowDone


def validate_command(arguments: Sequence[str]) -> None:
    """Run `trl-ext validate`.

    Raises:
        ConfigurationError: The run would be refused, or would fail for what its user can mend.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE.format(kinds=" or ".join(TRAINERS)))
        return
    named = next((kind for kind in TRAINERS if kind == arguments[0]), None)
    rest = arguments[1:] if named else arguments
    if rest and not rest[0].startswith("-"):
        raise ConfigurationError(f"validate: {rest[0]!r} is not one of {', '.join(TRAINERS)}")
    announce("validate")
    kind = named or _kind_of(rest)
    with held_warnings():
        settings, _, _ = read(kind, rest)
        check(kind, settings)
    samples = dry_window(kind, settings)
    model = settings[2].model_name_or_path
    print(f"valid: {kind} run of {model}, one window of {samples} samples ran; nothing was written")


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


def _kind_of(arguments: Sequence[str]) -> TrainerKind:
    """The training command that knows most of the settings of a YAML."""
    path = config_path(arguments)
    if path is None:
        raise ConfigurationError(f"validate: give {CONFIG} FILE, or a kind ({', '.join(TRAINERS)}) and flags")
    names = read_yaml(path).keys() - {"env"}
    unknown = {kind: len(names - known_settings(make_parser(kind))) for kind in TRAINERS}
    return min(TRAINERS, key=lambda kind: unknown[kind])
