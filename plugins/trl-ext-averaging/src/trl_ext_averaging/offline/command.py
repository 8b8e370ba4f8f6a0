"""`trl-ext average`: averages of checkpoints from the command line."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trl_ext.errors import ConfigurationError

# What computes is imported by the functions that use it: the help answers without torch.
if TYPE_CHECKING:
    from trl_ext_averaging.offline.actions import Goal

DTYPES = ("float32", "bfloat16", "float16", "float64")
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1}


def average_command(
    context: typer.Context,
    inputs: Annotated[list[Path], typer.Argument(help="Checkpoint folders; for lawa and ema a run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; appears only when it is complete.")],
    method: Annotated[
        str,
        typer.Option(
            "--method", "-m", help="mean, weighted, lawa, ema, wise-ft, slerp, soup, online or mergekit:<name>."
        ),
    ] = "mean",
    weights: Annotated[str | None, typer.Option(help="weighted: numbers that sum to 1, as 0.3,0.7.")] = None,
    alpha: Annotated[float, typer.Option(help="wise-ft: share of the tuned weights; slerp: position.")] = 0.5,
    decay: Annotated[float, typer.Option(help="ema: decay per checkpoint.")] = 0.9,
    warmup: Annotated[bool, typer.Option("--warmup", help="ema: min(decay, (1 + t) / (10 + t)).")] = False,
    last: Annotated[int | None, typer.Option(min=1, help="lawa, ema: only the latest so many checkpoints.")] = None,
    every: Annotated[int | None, typer.Option(min=1, help="lawa, ema: checkpoints so many steps apart.")] = None,
    base: Annotated[Path | None, typer.Option(help="slerp, mergekit: start of the task vectors; ema: start.")] = None,
    name: Annotated[str, typer.Option(help="online: the average to take from the checkpoint's state.")] = "ema",
    lora: Annotated[
        str | None, typer.Option(help="Adapters: product (B A; across runs) or factors (A and B; along one run).")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="product: rank of the output; absent: the sum.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or float64; as the last input.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file, as 5GB.")] = "5GB",
    metric: Annotated[
        str | None, typer.Option(help="soup, sweep: loss, module:function, file.py:function or a command with {}.")
    ] = None,
    maximize: Annotated[bool | None, typer.Option(help="Larger is better; by default for all but loss.")] = None,
    data: Annotated[Path | None, typer.Option(help="JSON lines for --metric loss.")] = None,
    sweep_: Annotated[
        str | None,
        typer.Option("--sweep", help="Values of alpha, decay or last, as 0,0.5,1; writes the best."),
    ] = None,
    parameters: Annotated[str, typer.Option(help="mergekit: parameters of its method, as JSON.")] = "{}",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
) -> None:
    """Average checkpoints on disk, piece by piece and without a GPU."""
    import torch

    from trl_ext_averaging.offline.actions import (
        Destination,
        write_average,
        write_best_of_sweep,
        write_soup,
        write_with_mergekit,
    )
    from trl_ext_averaging.offline.methods import Request

    with _failing_in_one_line():
        if lora not in (None, "product", "factors"):
            raise ConfigurationError(f"--lora {lora!r} is not one of product, factors")
        if dtype is not None and dtype not in DTYPES:
            raise ConfigurationError(f"--dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        numbers = None if weights is None else _numbers("--weights", weights)
        values = None if sweep_ is None else _numbers("--sweep", sweep_)
        shared = {
            "lora": lora,
            "rank": rank,
            "dtype": getattr(torch, dtype) if dtype else None,
            "max_shard_bytes": _bytes(max_shard_size),
        }
        request = Request(method, tuple(inputs), numbers, alpha, decay, warmup, last, every, base, name, shared)
        _refuse_idle_options(context, method, values is not None, metric)
        to = Destination(output, [path for path in (*inputs, base, data) if path is not None], overwrite, dry_run)
        to.check()
        if method.startswith("mergekit:"):
            write_with_mergekit(request, parameters, dtype, to)
        elif values is not None:
            write_best_of_sweep(request, values, _goal(metric, data, maximize), to)
        elif method == "soup":
            write_soup(request, _goal(metric, data, maximize), to)
        else:
            write_average(request.plan(), to)


@contextmanager
def _failing_in_one_line() -> Iterator[None]:
    """Let what the file system refuses end as what a user asked for wrongly: a path, a permission, a full disk."""
    try:
        yield
    except OSError as error:
        raise ConfigurationError(f"{error.filename or 'the file system'}: {error.strerror or error}") from None


def _refuse_idle_options(context: typer.Context, method: str, sweeps: bool, metric: str | None) -> None:
    """Refuse options that would do nothing.

    Raises:
        ConfigurationError: names one, and the methods that it is for.
    """
    from trl_ext_averaging.offline.methods import OPTIONS, SWEPT

    given = {
        name for name in context.params if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }
    kind = method.partition(":")[0]
    for option, methods in OPTIONS.items():
        if option in given and kind not in methods:
            raise ConfigurationError(f"--{option} does nothing with --method {method}; it is for {', '.join(methods)}")
    if sweeps and SWEPT.get(method) in given:
        raise ConfigurationError(
            f"--sweep tries values of {SWEPT[method]}, so --{SWEPT[method]} does nothing; remove it"
        )
    if "metric" in given and not sweeps and method != "soup":
        raise ConfigurationError("--metric does nothing without --sweep or --method soup")
    if "maximize" in given and metric is None:
        raise ConfigurationError("--maximize and --no-maximize do nothing without --metric")
    if "data" in given and metric != "loss":
        raise ConfigurationError("--data does nothing without --metric loss")


def _goal(metric: str | None, data: Path | None, maximize: bool | None) -> Goal:
    from trl_ext_averaging.offline.actions import Goal
    from trl_ext_averaging.offline.metric import metric_of

    if metric is None:
        raise ConfigurationError("soup and --sweep need --metric")
    return Goal(metric_of(metric, data), metric, metric != "loss" if maximize is None else maximize)


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = (math.nan,)
    if not all(map(math.isfinite, numbers)):
        raise ConfigurationError(f"{option} {text!r} is not a list of numbers such as 0.3,0.7")
    return numbers


def _bytes(text: str) -> int:
    unit = next((unit for unit in UNITS if text.upper().endswith(unit)), "")
    try:
        size = float(text[: -len(unit)] if unit else text) * UNITS.get(unit, 1)
    except ValueError:
        size = 0
    if not 1 <= size < math.inf:
        raise ConfigurationError(f"--max-shard-size {text!r} is not a size such as 5GB or 500MiB")
    return int(size)
