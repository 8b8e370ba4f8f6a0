"""The number by which an average is chosen: a held-out loss, a Python function, or a command."""

from __future__ import annotations

import math
import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trl_ext_probing.encoding import data_column, encode
from trl_ext_probing.functions import load_function
from trl_ext_probing.models import load_model
from trl_ext_probing.scoring import Scorer

from trl_ext.data import load_dataset_spec
from trl_ext.errors import ConfigurationError

Metric = Callable[[Path], float]
"""The folder of a checkpoint -> a number."""


def metric_of(spec: str, data: Path | None = None) -> Metric:
    """The metric that a command line names.

    Args:
        spec: "loss"; "module:function" or "file.py:function", called with the folder as text; or a shell command with
            `{}` for the folder, whose last line of output is the number.
        data: JSON lines for "loss".

    Raises:
        ConfigurationError: it names nothing that can be called. The metric itself raises it where it fails, or gives
            NaN.
    """
    if spec == "loss":
        if data is None:
            raise ConfigurationError("--metric loss needs --data FILE.jsonl")
        rows = read_rows(data)
        metric: Metric = lambda folder: held_out_loss(folder, rows)  # noqa: E731
    elif "{}" in spec:
        metric = lambda folder: _run_command(spec, folder)  # noqa: E731
    elif ":" in spec:
        function = load_function(spec, "--metric")
        metric = lambda folder: float(function(str(folder)))  # noqa: E731
    else:
        raise ConfigurationError(
            f"--metric {spec!r} is not loss, module:function, file.py:function or a command with {{}} for the folder"
        )

    def checked(folder: Path) -> float:
        try:
            value = metric(folder)
        except ConfigurationError:
            raise
        except Exception as error:  # a model that does not load, or whatever a function of the user raises
            raise ConfigurationError(f"--metric {spec!r} failed on {folder}: {_in_a_line(error)}") from None
        if math.isnan(value):
            raise ConfigurationError(f"--metric {spec!r} gave NaN for {folder}")
        return value

    return checked


def read_rows(data: Path) -> list[dict[str, Any]]:
    """Rows of a data file, each with `text`, `prompt` and `completion`, or `messages`.

    Raises:
        ConfigurationError: It cannot be read, or a row has another form.
    """
    loaded = load_dataset_spec({"path": str(data)}, "--data")
    rows = [{name: value for name, value in row.items() if value is not None} for row in loaded]
    for i, row in enumerate(rows):
        try:
            data_column(list(row))
        except ConfigurationError as error:
            raise ConfigurationError(f"--data {data}, row {i}: {error}") from None
    return rows


def held_out_loss(folder: Path, rows: Sequence[dict[str, Any]], max_length: int = 1024) -> float:
    """Mean negative log-likelihood in nats per label token, on the tokens that TRL's SFT would train on.

    Raises:
        ConfigurationError: The model cannot be loaded, or no row has a label token.
    """
    model, tokenizer = load_model(str(folder))
    scores = Scorer(model).score([encode(tokenizer, row, max_length) for row in rows])
    count = sum(len(of_row.log_probs) for of_row in scores)
    if not count:
        raise ConfigurationError(f"the rows of --data have no label token within {max_length} tokens")
    return -sum(float(of_row.log_probs.sum(dtype=float)) for of_row in scores) / count


def _run_command(command: str, folder: Path) -> float:
    done = subprocess.run(command.replace("{}", shlex.quote(str(folder))), shell=True, capture_output=True, text=True)
    lines = done.stdout.split()
    if done.returncode or not lines:
        said = " ".join(done.stderr.split())[-500:]
        raise ConfigurationError(f"--metric {command!r} failed ({done.returncode}): {said}")
    try:
        return float(lines[-1])
    except ValueError:
        raise ConfigurationError(f"--metric {command!r} must print a number last, not {lines[-1]!r}") from None


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
