"""From a command line and its YAML to TRL's settings: what is misspelt or of the wrong kind is refused in one line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from trl_ext.errors import ConfigurationError, did_you_mean

CONFIG = "--config"
ACCELERATE_CONFIG = "--accelerate_config"


@dataclass(frozen=True)
class CommandLine:
    """What was asked for: TRL's settings, and the flags that are not TRL's."""

    settings: tuple[Any, ...]
    """The script's, the trainer's, the model's and the data's."""
    config_rest: tuple[str, ...]
    """Keys of the YAML that TRL's parser does not know, as flags with their values."""
    flags_rest: tuple[str, ...]
    """The same of the command line."""

    def unknown(self) -> list[str]:
        """The names of what TRL's parser does not know, without dashes."""
        rest = (*self.config_rest, *self.flags_rest)
        return [text[2:].partition("=")[0] for text in rest if text.startswith("--")]


def read_command_line(parser: Any, arguments: Sequence[str]) -> CommandLine:
    """Read a command line with TRL's parser.

    Args:
        parser: The `TrlParser` of a training script.
        arguments: The command line after the command's name, from `in_two_words`.

    Raises:
        ConfigurationError: The YAML cannot be read, or a value is not of its setting's type or is refused by the
            config's class.
    """
    from trl_ext.cli.yaml_files import read_yaml

    path = config_path(arguments)
    config = read_yaml(path, CONFIG) if path else {}
    if not isinstance(config.get("env", {}), dict):
        raise ConfigurationError(f"{path}: env: {config['env']!r} is not a mapping from variables to values")
    if path:
        _refuse_wrong_types(parser, config, path)
    parser.error = lambda message: refuse_value(message, config, path, arguments)
    try:
        *settings, config_rest, flags_rest = parser.parse_args_and_config(
            arguments, return_remaining_strings=True, separate_remaining_strings=True
        )
    except ConfigurationError:
        raise
    except (ValueError, TypeError, ImportError) as error:  # what the configs' classes refuse
        raise ConfigurationError(_advise(str(error))) from None
    if stray := next((text for text in flags_rest[:1] if not text.startswith("-")), None):
        raise ConfigurationError(f"{stray!r} belongs to no flag; settings are given as --name value")
    return CommandLine(tuple(settings), tuple(config_rest), tuple(flags_rest))


def refuse_unknown(names: Iterable[str], parser: Any, more: Iterable[str], arguments: Sequence[str]) -> None:
    """Refuse settings that nobody knows.

    Args:
        names: Those that were found, without dashes.
        parser: TRL's parser.
        more: Names that are known beside the parser's.
        arguments: The command line, to tell a flag from a key of the YAML.

    Raises:
        ConfigurationError: With the nearest names that exist.
    """
    known = {*known_settings(parser), *more}
    for name in names:
        if name.replace("-", "_") in known:
            continue
        flag = next((text for text in arguments if text.partition("=")[0] == f"--{name}"), None)
        where = f"there is no flag --{name}" if flag else f"{config_path(arguments)}: there is no setting {name!r}"
        near = did_you_mean(name.replace("-", "_"), known)
        raise ConfigurationError(f"{where}. {near}".rstrip() if near else f"{where}; --help lists all")


def known_settings(parser: Any) -> set[str]:
    """The settings of TRL's parser."""
    return {action.dest for action in parser._actions}


def in_two_words(arguments: Sequence[str]) -> list[str]:
    """The command line with `--config=FILE` as `--config FILE`, and so each flag that TRL reads as two words only."""
    apart = tuple(f"{flag}=" for flag in (CONFIG, ACCELERATE_CONFIG))
    return [word for text in arguments for word in (text.split("=", 1) if text.startswith(apart) else [text])]


def config_path(arguments: Sequence[str]) -> Path | None:
    """The file that `--config` names, in a command line from `in_two_words`.

    Raises:
        ConfigurationError: It names none.
    """
    if CONFIG not in arguments:
        return None
    value = [*arguments[list(arguments).index(CONFIG) + 1 :]][:1]
    if not value or value[0].startswith("--"):
        raise ConfigurationError(f"{CONFIG} names no file")
    return Path(value[0])


def _refuse_wrong_types(parser: Any, config: Mapping[str, Any], path: Path) -> None:
    """Refuse values that argparse passes on unseen: it converts text alone, and YAML has given numbers and lists."""
    every = (field for settings in parser.dataclass_types for field in fields(settings))
    types: dict[str, Any] = {field.name: field.type for field in every}
    numbers: dict[Any, tuple[type, ...]] = {int: (int,), float: (int, float), bool: (bool, int)}
    for name, value in config.items():
        wanted = bool if types.get(name) == bool | None else types.get(name)
        if not isinstance(wanted, type) or wanted not in numbers or value is None or isinstance(value, str):
            continue
        if not isinstance(value, numbers[wanted]) or (isinstance(value, bool) and wanted is not bool):
            raise ConfigurationError(
                f"{path}: {name}: {value!r} is a {type(value).__name__}; expected {wanted.__name__}"
            )


def refuse_value(
    message: str, config: Mapping[str, Any] | None = None, path: Path | None = None, arguments: Sequence[str] = ()
) -> NoReturn:
    """Refuse a value as argparse does, in place of its `error`, and say where the value stands.

    Raises:
        ConfigurationError: With `message`.
    """
    found = re.match(r"argument --(?P<name>\w+)\S*: (?P<what>.*)", message, re.DOTALL)
    if found is None:
        raise ConfigurationError(message)
    name = found["name"]
    in_file = name in (config or {}) and not any(text.partition("=")[0] == f"--{name}" for text in arguments)
    raise ConfigurationError(f"{path}: {name}: {found['what']}" if in_file else f"--{name}: {found['what']}")


def _advise(message: str) -> str:
    """What a config's class says, with the line to change where it does not name it."""
    if "bf16" in message and "use_cpu" in message:
        return "bf16 is on, as TRL has it by default, and needs a GPU; on a CPU, set use_cpu: true and bf16: false"
    return message
