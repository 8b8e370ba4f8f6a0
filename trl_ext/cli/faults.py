"""What TRL, transformers, torch and datasets raise for a user's mistake while a run is built, and what to say instead.

Each kind is known by where it is raised. Anything else is a bug, here or there, and keeps its traceback.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any

from trl_ext.errors import ConfigurationError

REFUSALS = (ValueError, TypeError, ImportError, RuntimeError, NotImplementedError)


@contextmanager
def explain_faults(training_args: Any, model_args: Any) -> Iterator[None]:
    """A context in which TRL's training script runs.

    Args:
        training_args, model_args: Its settings, which messages name.

    Raises:
        ConfigurationError: For a mistake that is known.
    """
    try:
        yield
    except (OSError, *REFUSALS) as error:
        message = _explanation(error, training_args, model_args)
        if message is None:
            raise
        raise ConfigurationError(message) from None


def _explanation(error: BaseException, training_args: Any, model_args: Any) -> str | None:
    if isinstance(error, ConfigurationError):
        return None
    frames = traceback.extract_tb(error.__traceback__)
    raised = frames[-1]
    place = PurePath(raised.filename).parts
    text = str(error).strip()
    if "num_samples=0" in text and place[-3:] == ("utils", "data", "sampler.py"):
        return (
            f"no sample of the training set has a label token left (max_length={training_args.max_length}): what is "
            "cut off leaves none of the completions; raise max_length, or look at the data"
        )
    if tracker := re.match(r"(\w+)Callback requires (.+?) to be installed", text):
        package = re.search(r"pip install ([\w.\[\]><=-]+)", text)
        name = package[1].rstrip(".") if package else tracker[1].lower()
        return f"report_to: {tracker[1]} is not installed: pip install {name}, or set report_to: none"
    if any(frame.name == "from_pretrained" and "auto" in PurePath(frame.filename).parts for frame in frames):
        return f"model_name_or_path: {model_args.model_name_or_path!r} cannot be loaded: {text}"
    if isinstance(error, ImportError) and re.search(r"\binstall", text):
        return text
    if _is_library(place) and raised.name in ("__init__", "__post_init__") and isinstance(error, REFUSALS):
        return text  # what a constructor of TRL's or transformers' finds wrong with its arguments
    return None


def _is_library(place: tuple[str, ...]) -> bool:
    return any(package in place for package in ("trl", "transformers", "accelerate", "peft"))
