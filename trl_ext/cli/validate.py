"""`trl-ext validate`: every check of a run and one window of its data, without an optimiser step and without a file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from transformers import TrainerCallback

from trl_ext.cli.app import KINDS
from trl_ext.cli.ending import held_warnings
from trl_ext.cli.faults import explain_faults
from trl_ext.cli.settings import CONFIG, config_path, known_settings, read_yaml
from trl_ext.cli.train import Settings, announce, check, make_parser, read
from trl_ext.errors import ConfigurationError

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
        print(USAGE.format(kinds=" or ".join(KINDS)))
        return
    kind, *rest = arguments if arguments[0] in KINDS else (None, *arguments)
    if rest and not rest[0].startswith("-"):
        raise ConfigurationError(f"validate: {rest[0]!r} is not one of {', '.join(KINDS)}")
    announce("validate")
    kind = kind or _kind_of(rest)
    with held_warnings():
        settings, _, _ = read(kind, rest)
        check(kind, settings)
    samples = dry_window(kind, settings)
    print(
        f"valid: {kind} run of {settings[2].model_name_or_path}, one window of {samples} samples ran; nothing written"
    )


def dry_window(kind: str, settings: Settings) -> int:
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

    name = f"{kind.upper()}Trainer"
    ours = getattr(trl, name)

    class Dry(ours):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            self.add_callback(StopBeforeStep())
            return super().train(*args, **kwargs)

    Dry.__name__ = name
    setattr(trl, name, Dry)
    try:
        yield
    finally:
        setattr(trl, name, ours)


def _kind_of(arguments: Sequence[str]) -> str:
    """The training command that knows most of the settings of a YAML."""
    path = config_path(arguments)
    if path is None:
        raise ConfigurationError(f"validate: give {CONFIG} FILE, or a kind ({', '.join(KINDS)}) and flags")
    names = read_yaml(path).keys() - {"env"}
    unknown = {kind: len(names - known_settings(make_parser(kind))) for kind in KINDS}
    return min(KINDS, key=lambda kind: unknown[kind])
