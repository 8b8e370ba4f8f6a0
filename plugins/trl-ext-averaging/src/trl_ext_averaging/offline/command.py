"""`trl-ext average`: averages of checkpoints from the command line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from trl_ext.errors import ConfigurationError
from trl_ext_averaging.offline import with_mergekit
from trl_ext_averaging.offline.adapters import AdapterProduct
from trl_ext_averaging.offline.average import Plan, average
from trl_ext_averaging.offline.checkpoint import Checkpoint
from trl_ext_averaging.offline.methods import SWEPT, Request, mean_plan, open_all
from trl_ext_averaging.offline.metric import Metric, metric_of
from trl_ext_averaging.offline.search import best, greedy_soup, plot, sweep
from trl_ext_averaging.offline.sources import PIECE
from trl_ext_averaging.offline.write import PROVENANCE, atomic_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1}

console = Console(stderr=True, soft_wrap=True)


def average_command(
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
    if lora not in (None, "product", "factors"):
        raise ConfigurationError(f"--lora {lora!r} is not one of product, factors")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigurationError(f"--dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if output.exists() and not overwrite:
        raise ConfigurationError(f"{output} exists; choose another --output or add --overwrite")
    shared = {
        "lora": lora,
        "rank": rank,
        "dtype": DTYPES[dtype] if dtype else None,
        "max_shard_bytes": _bytes(max_shard_size),
    }
    numbers = _numbers("--weights", weights) if weights else None
    request = Request(method, tuple(inputs), numbers, alpha, decay, warmup, last, every, base, name, shared)
    scored = _metric(metric, data) if sweep_ or method == "soup" else None
    larger = metric != "loss" if maximize is None else maximize
    if method.startswith("mergekit:"):
        _mergekit(request, parameters, dtype, output, overwrite, dry_run)
    elif sweep_:
        assert scored is not None
        _sweep(request, _numbers("--sweep", sweep_), scored, larger, metric or "", output, overwrite, dry_run)
    elif method == "soup":
        assert scored is not None
        _soup(request, scored, larger, output, overwrite, dry_run)
    else:
        _write(request.plan(), output, overwrite, dry_run)


def _write(plan: Plan, output: Path, overwrite: bool, dry_run: bool) -> None:
    source = plan.source()
    total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in source.layout.values())
    _describe(plan, len(source.layout), total, output)
    if dry_run:
        console.print("dry run: nothing written")
        return
    columns = (TextColumn("averaging"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=total)
        source = average(plan, output, overwrite, lambda nbytes: progress.advance(bar, nbytes))
    if isinstance(source, AdapterProduct) and plan.rank:
        console.print(f"rank {plan.rank}: relative error of the worst module {source.truncation:.2e}")
    console.print(f"wrote {output}")


def _describe(plan: Plan, tensors: int, total: int, output: Path) -> None:
    coefficients = ["by tensor"] * len(plan.inputs) if callable(plan.rule) else [f"{c:.6g}" for c in plan.rule]
    console.print(f"{plan.method} {dict(plan.options) or ''}".rstrip())
    for checkpoint, coefficient in zip(plan.inputs, coefficients, strict=True):
        step = f" (step {checkpoint.step})" if checkpoint.step is not None else ""
        console.print(f"  {coefficient:>9}  {checkpoint.path}{step}")
    if plan.lora_mode == "factors" and len(plan.inputs) > 1:
        console.print("  lora: A and B each; right along one run only, use --lora product across runs")
    elif plan.lora_mode:
        console.print(f"  lora: by {plan.lora_mode}")
    if len({c.path.resolve().parent for c in plan.inputs}) > 1 and any(map(_from_rl, plan.inputs)):
        console.print("  warning: models from RL of different runs merge poorly (arXiv:2606.18521); check the result")
    memory = PIECE * 12 / 2**20
    console.print(
        f"  {tensors} tensors, {total / 2**20:.1f} MiB to {output}; about {memory:.0f} MiB of memory for pieces"
    )


def _from_rl(checkpoint: Checkpoint) -> bool:
    card = checkpoint.path / "README.md"
    return card.is_file() and "- grpo" in card.read_text().lower()


def _sweep(
    request: Request,
    values: Sequence[float],
    metric: Metric,
    maximize: bool,
    label: str,
    output: Path,
    overwrite: bool,
    dry_run: bool,
) -> None:
    plans = {value: request.at(value).plan() for value in values}
    for plan in plans.values():
        plan.source()
    option = SWEPT[request.method]
    if dry_run:
        console.print(f"{request.method}: {len(plans)} values of {option}; dry run: nothing written")
        return
    points = sweep(plans, metric, output, lambda point: console.print(f"  {option} {point.value:g}: {point.score:g}"))
    chosen = best(points, maximize)
    console.print(f"best: {option} {chosen.value:g} ({chosen.score:g})")
    tried = {f"{option}={point.value:g}": point.score for point in points}
    plan = plans[chosen.value]
    _write(replace(plan, options={**plan.options, "metric": label, "sweep": tried}), output, overwrite, False)
    (output / "sweep.json").write_text(json.dumps([asdict(point) for point in points], indent=2) + "\n")
    try:
        plot(points, output / "sweep.png", option, label)
    except ImportError:
        console.print("no plot: pip install trl-ext[plot]")


def _soup(request: Request, metric: Metric, maximize: bool, output: Path, overwrite: bool, dry_run: bool) -> None:
    inputs = open_all(request, least=2)
    whole = mean_plan(request, inputs)
    whole.source()
    if dry_run:
        console.print(f"greedy soup of up to {len(inputs)} checkpoints; dry run: nothing written")
        return

    def note(what: str, score: float, kept: bool) -> None:
        console.print(f"  {what}: {score:g}{'' if kept else ', left out'}")

    chosen = greedy_soup(inputs, lambda some: mean_plan(request, some), metric, maximize, output, note)
    _write(mean_plan(request, chosen), output, overwrite, False)


def _mergekit(
    request: Request, parameters: str, dtype: str | None, output: Path, overwrite: bool, dry_run: bool
) -> None:
    try:
        options: Mapping[str, Any] = json.loads(parameters)
    except ValueError as error:
        raise ConfigurationError(f"--parameters {parameters!r} is not JSON: {error}") from error
    name = request.method.removeprefix("mergekit:")
    config = with_mergekit.mergekit_config(name, request.inputs, request.weights, request.base, options, dtype)
    inputs = open_all(request)
    console.print_json(data=config)
    if dry_run:
        console.print("dry run: nothing written")
        return
    with atomic_folder(output, overwrite) as folder:
        with_mergekit.merge(config, inputs, folder)
        provenance = {"method": request.method, "config": config, "version": version("trl-ext-averaging")}
        (folder / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n")
    console.print(f"wrote {output}")


def _metric(spec: str | None, data: Path | None) -> Metric:
    if spec is None:
        raise ConfigurationError("soup and --sweep need --metric")
    return metric_of(spec, data)


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigurationError(f"{option} {text!r} is not a list of numbers such as 0.3,0.7") from error


def _bytes(text: str) -> int:
    unit = next((unit for unit in UNITS if text.upper().endswith(unit)), "")
    try:
        size = float(text[: -len(unit)] if unit else text) * UNITS.get(unit, 1)
    except ValueError:
        size = 0
    if size < 1:
        raise ConfigurationError(f"--max-shard-size {text!r} is not a size such as 5GB or 500MiB")
    return int(size)
