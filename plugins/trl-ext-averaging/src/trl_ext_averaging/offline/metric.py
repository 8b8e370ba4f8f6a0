"""The number by which an average is chosen: a held-out loss, a Python function, or a command."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_ext.errors import ConfigurationError

FORMS: tuple[dict[str, type], ...] = ({"text": str}, {"prompt": str, "completion": str}, {"messages": list})
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
        function = _load_function(spec)
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
    """Rows of a JSON-lines file with `text`, `prompt` and `completion`, or `messages`.

    Raises:
        ConfigurationError: another form, or no rows.
    """
    try:
        rows = [json.loads(line) for line in data.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise ConfigurationError(f"--data {data} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"--data {data} is not JSON lines: {error}") from None
    if not rows or not all(isinstance(row, dict) and any(_has(row, form) for form in FORMS) for row in rows):
        raise ConfigurationError(
            f"--data {data}: every row needs texts `text`, `prompt` and `completion`, or a list `messages`"
        )
    return rows


def _has(row: Mapping[str, Any], form: Mapping[str, type]) -> bool:
    return all(isinstance(row.get(name), kind) for name, kind in form.items())


def held_out_loss(folder: Path, rows: Sequence[dict[str, Any]], max_length: int = 1024) -> float:
    """Mean negative log-likelihood in nats per label token; of the completion alone where rows have a prompt.

    Runs on the GPU where there is one. Rows go one by one, so that padding plays no part.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    total, count = 0.0, 0
    for row in rows:
        if "messages" in row:
            prompt, text = "", tokenizer.apply_chat_template(row["messages"], tokenize=False)
        else:
            prompt = row.get("prompt", "")
            text = row.get("text", prompt + row.get("completion", ""))
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :max_length].to(device)
        first = max(len(tokenizer(prompt).input_ids) if prompt else 0, 1)
        if ids.shape[1] <= first:
            continue
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, first - 1 : -1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, first:], reduction="sum"))
        count += ids.shape[1] - first
    if not count:
        raise ConfigurationError(f"the rows of --data have no label token within {max_length} tokens")
    return total / count


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


def _load_function(spec: str) -> Callable[[str], Any]:
    source, _, name = spec.rpartition(":")
    try:
        if source.endswith(".py"):
            module_spec = importlib.util.spec_from_file_location("averaging_metric", source)
            if module_spec is None or module_spec.loader is None:
                raise ImportError(f"{source} is not a Python file")
            module = importlib.util.module_from_spec(module_spec)
            module_spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
        function = getattr(module, name)
    except Exception as error:  # the module is the user's and may raise anything
        raise ConfigurationError(f"--metric {spec!r} cannot be loaded: {_in_a_line(error)}") from None
    if not callable(function):
        raise ConfigurationError(f"--metric {spec!r} is a {type(function).__name__} and no function")
    return function


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
