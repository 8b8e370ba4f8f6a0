"""Several processes from one command: `--num_processes`, `--accelerate_config` and accelerate's other flags."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from typing import Any

from trl_ext.cli.ending import INTERRUPTED
from trl_ext.cli.settings import ACCELERATE_CONFIG, refuse_value
from trl_ext.errors import ConfigurationError, did_you_mean
from trl_ext.jobs import TIED

LAUNCHED = "TRL_EXT_LAUNCHED"
"""Set in the processes that a launch has started: the flags of the launch are still in their YAML."""
LAUNCHERS = (LAUNCHED, "TORCHELASTIC_RUN_ID", "RANK")


def launch_flags() -> set[str]:
    """The names of the flags that start processes, without dashes: TRL's own one and accelerate's."""
    from accelerate.commands.launch import launch_command_parser

    options = launch_command_parser()._option_string_actions
    flags = (ACCELERATE_CONFIG, *(name for name in options if name[:2] == "--"))
    return {name.removeprefix("--").replace("-", "_") for name in flags}


def is_launched() -> bool:
    """Whether a launcher has started this process."""
    return any(name in os.environ for name in LAUNCHERS)


def launch(kind: str, launch_args: Sequence[str], arguments: Sequence[str], on_cpu: bool) -> int:
    """Start `trl-ext <kind>` on several processes, as `trl <kind>` starts its script.

    Args:
        kind: The training command.
        launch_args: Flags of the launch with their values.
        arguments: The command line without them.
        on_cpu: Whether the run trains without an accelerator.

    Returns:
        The exit code.

    Raises:
        ConfigurationError: The launch cannot be as asked for.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from trl.cli.accelerate_config import resolve_accelerate_config_argument
    from trl.cli.accelerate_launcher import launch_training_script

    def strict_parser() -> Any:
        parser = launch_command_parser()
        parser.error = refuse_value
        return parser

    def start(parsed: Any) -> None:
        parsed.module, parsed.training_script = True, "trl_ext"
        _spread_over_cpu(parsed, on_cpu)
        launch_command(parsed)

    os.environ[LAUNCHED] = os.environ[TIED] = "1"
    try:
        resolved = resolve_accelerate_config_argument(list(launch_args))
        launch_training_script(
            f"{kind}.py", resolved, [kind, *arguments], launch_command_fn=start, launch_parser_fn=strict_parser
        )
    except ChildFailedError as error:
        return max(failure.exitcode for failure in error.failures.values()) or 1
    except subprocess.CalledProcessError as error:
        return error.returncode
    except SignalException:
        return INTERRUPTED
    except ConfigurationError:
        raise
    except ValueError as error:
        raise ConfigurationError(_with_names(str(error), launch_args)) from None
    return 0


def _spread_over_cpu(parsed: Any, on_cpu: bool) -> None:
    """Let accelerate start all processes on a CPU too, over gloo; of itself it starts one there, without a word."""
    if parsed.cpu and (parsed.num_processes or 1) > 1:
        raise ConfigurationError(
            "--cpu starts one process whatever num_processes says; leave it out, and set use_cpu: true"
        )
    alone = not (parsed.multi_gpu or parsed.use_fsdp or parsed.use_deepspeed or parsed.tpu)
    if on_cpu and alone and ((parsed.num_processes or 1) > 1 or _is_multi_cpu(parsed.config_file)):
        parsed.multi_gpu = True  # the launcher of torchrun; which backend it is, the processes find


def _is_multi_cpu(config_file: str | None) -> bool:
    from accelerate.commands.config.config_args import load_config_from_file

    return config_file is not None and load_config_from_file(config_file).distributed_type == "MULTI_CPU"


def _with_names(message: str, launch_args: Sequence[str]) -> str:
    """TRL's refusal of an unknown configuration, with the nearest of those that it brings."""
    if "neither a file nor a valid config" not in message:
        return message
    from importlib.resources import files

    names = sorted(file.name.removesuffix(".yaml") for file in files("trl.accelerate_configs").iterdir())
    given = launch_args[list(launch_args).index(ACCELERATE_CONFIG) + 1]
    names = [name for name in names if not name.startswith("__")]
    return (
        f"{ACCELERATE_CONFIG}: {given!r} is no file and none of TRL's configurations. {did_you_mean(given, names)}"
        f"TRL has {', '.join(names)}"
    )
