"""`trl-ext validate`: every check of a run and one window of its data, without an optimiser step and without a file."""

from __future__ import annotations

from collections.abc import Sequence

from trl_ext.cli.ending import held_warnings
from trl_ext.cli.settings import CONFIG, config_path, in_two_words, known_settings
from trl_ext.cli.train import announce, check, make_parser, read
from trl_ext.errors import ConfigurationError
from trl_ext.records import TRAINERS, TrainerKind

USAGE = """Usage: trl-ext validate [KIND] --config FILE [SETTINGS]...

  Check a training configuration as `trl-ext KIND` would, build its trainer, and
  run one accumulation window forward and backward: no optimiser step, no file.

  KIND is {kinds}; left out, it is the one whose settings FILE has.
  SETTINGS are flags of the training command, and override FILE."""


def validate_command(arguments: Sequence[str]) -> None:
    """Run `trl-ext validate`.

    Raises:
        ConfigurationError: The run would be refused, or would fail for what its user can mend.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE.format(kinds=" or ".join(TRAINERS)))
        return
    named = next((kind for kind in TRAINERS if kind == arguments[0]), None)
    rest = in_two_words(arguments[1:] if named else arguments)
    if rest and not rest[0].startswith("-"):
        raise ConfigurationError(f"validate: {rest[0]!r} is not one of {', '.join(TRAINERS)}")
    announce("validate")
    kind = named or _kind_of(rest)
    with held_warnings():
        settings, _, _ = read(kind, rest)
        check(kind, settings)
    from trl_ext.cli.dry_window import dry_window

    samples = dry_window(kind, settings)
    model = settings[2].model_name_or_path
    print(f"valid: {kind} run of {model}, one window of {samples} samples ran; nothing was written")


def _kind_of(arguments: Sequence[str]) -> TrainerKind:
    """The training command that knows most of the settings of a YAML."""
    path = config_path(arguments)
    if path is None:
        raise ConfigurationError(f"validate: give {CONFIG} FILE, or a kind ({', '.join(TRAINERS)}) and flags")
    from trl_ext.cli.yaml_files import read_yaml

    names = read_yaml(path, CONFIG).keys() - {"env"}
    unknown = {kind: len(names - known_settings(make_parser(kind))) for kind in TRAINERS}
    return min(TRAINERS, key=lambda kind: unknown[kind])
