"""What `trl-ext average` does once it knows what is asked for: write one average, or search for the best, and tell."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from trl_ext_probing.results import without_matplotlib_say_so

from trl_ext.errors import ConfigurationError
from trl_ext_averaging.offline import with_mergekit
from trl_ext_averaging.offline.adapters import AdapterProduct
from trl_ext_averaging.offline.checkpoint import Checkpoint
from trl_ext_averaging.offline.combination import PIECE
from trl_ext_averaging.offline.methods import SWEPT, Request, mean_plan, open_all
from trl_ext_averaging.offline.metric import Metric
from trl_ext_averaging.offline.output_folder import check_output, output_folder, sign
from trl_ext_averaging.offline.plan import Plan
from trl_ext_averaging.offline.search import Point, best, greedy_soup, plot, sweep

console = Console(stderr=True, soft_wrap=True)
_COLUMNS = (TextColumn("averaging"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())


@dataclass(frozen=True)
class Destination:
    """Where the result goes, and whether it goes there.

    Args:
        output: the folder.
        inputs: what is read, and must not be replaced.
        overwrite: whether an earlier output may be replaced.
        dry_run: check only.
    """

    output: Path
    inputs: Sequence[Path]
    overwrite: bool = False
    dry_run: bool = False

    def check(self) -> None:
        """Refuse a place that is taken, as `output_folder` will."""
        check_output(self.output, self.overwrite, self.inputs)

    def open(self) -> AbstractContextManager[Path]:
        """The folder to write into, as `output_folder`."""
        return output_folder(self.output, self.overwrite, self.inputs)


@dataclass(frozen=True)
class Goal:
    """What makes one average better than another.

    Args:
        metric: gives a folder's score.
        label: the metric as the user named it.
        maximize: whether larger is better.
    """

    metric: Metric
    label: str
    maximize: bool


def write_average(plan: Plan, to: Destination) -> None:
    """Write one average."""
    _announce(plan, to)
    if _stops(to):
        return
    with to.open() as folder:
        _write(plan, folder)
        sign(folder, plan.provenance())
    console.print(f"wrote {to.output}")


def write_best_of_sweep(request: Request, values: Sequence[float], goal: Goal, to: Destination) -> None:
    """Try a method at several values, and write the best average with the points and their curve."""
    plans = {value: request.at(value).plan() for value in values}
    for plan in plans.values():
        _ = plan.source  # refuses what does not belong together, before anything is written
    option = SWEPT[request.method]
    console.print(f"{request.method}: {len(plans)} values of {option}")
    if _stops(to):
        return
    with to.open() as folder:
        points = sweep(plans, goal.metric, folder, lambda p: console.print(f"  {option} {p.value:g}: {p.score:g}"))
        chosen = best(points, goal.maximize)
        console.print(f"best: {option} {chosen.value:g} ({chosen.score:g})")
        tried = {f"{option}={point.value:g}": point.score for point in points}
        plan = plans[chosen.value]
        plan = replace(plan, options={**plan.options, "metric": goal.label, "sweep": tried})
        _announce(plan, to)
        _write(plan, folder)
        _keep_points(points, chosen, folder, option, goal.label)
        sign(folder, plan.provenance())
    console.print(f"wrote {to.output}")


def write_soup(request: Request, goal: Goal, to: Destination) -> None:
    """Write the greedy soup of the inputs."""
    inputs = open_all(request, least=2)
    _ = mean_plan(request, inputs).source  # refuses what does not belong together, before anything is evaluated
    console.print(f"greedy soup of up to {len(inputs)} checkpoints")
    if _stops(to):
        return

    def note(what: str, score: float, kept: bool) -> None:
        console.print(f"  {what}: {score:g}{'' if kept else ', left out'}")

    with to.open() as folder:
        chosen = greedy_soup(inputs, lambda some: mean_plan(request, some), goal.metric, goal.maximize, folder, note)
        plan = mean_plan(request, chosen)
        _announce(plan, to)
        _write(plan, folder)
        sign(folder, plan.provenance())
    console.print(f"wrote {to.output}")


def write_with_mergekit(request: Request, parameters: str, dtype: str | None, to: Destination) -> None:
    """Let mergekit write its merge.

    Raises:
        ConfigurationError: `parameters` is no JSON mapping, or mergekit refuses.
    """
    try:
        options: Any = json.loads(parameters)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"--parameters {parameters!r} is not JSON: {error}") from None
    if not isinstance(options, Mapping):
        raise ConfigurationError(f'--parameters {parameters!r} is no mapping such as {{"density": 0.5}}')
    name = request.method.removeprefix("mergekit:")
    config = with_mergekit.mergekit_config(name, request.inputs, request.weights, request.base, options, dtype)
    inputs = open_all(request)
    console.print_json(data=config)
    if _stops(to):
        return
    with to.open() as folder:
        with_mergekit.merge(config, inputs, folder)
        sign(folder, {"method": request.method, "config": config, "version": version("trl-ext-averaging")})
    console.print(f"wrote {to.output}")


def _stops(to: Destination) -> bool:
    if to.dry_run:
        console.print("dry run: nothing written")
    return to.dry_run


def _write(plan: Plan, folder: Path) -> None:
    total = _nbytes(plan)
    with Progress(*_COLUMNS, console=console, transient=True) as progress:
        bar = progress.add_task("", total=total)
        source = plan.write(folder, lambda nbytes: progress.advance(bar, nbytes))
    if isinstance(source, AdapterProduct) and plan.rank:
        console.print(f"rank {plan.rank}: relative error of the worst module {source.truncation:.2e}")


def _nbytes(plan: Plan) -> int:
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in plan.source.layout.values())


def _keep_points(points: Sequence[Point], chosen: Point, folder: Path, option: str, label: str) -> None:
    (folder / "sweep.json").write_text(json.dumps([asdict(point) for point in points], indent=2) + "\n")
    with without_matplotlib_say_so("sweep.png"):
        plot(points, chosen, folder / "sweep.png", option, label)


def _announce(plan: Plan, to: Destination) -> None:
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
    tensors, total, memory = len(plan.source.layout), _nbytes(plan) / 2**20, PIECE * 12 / 2**20
    console.print(f"  {tensors} tensors, {total:.1f} MiB to {to.output}; about {memory:.0f} MiB of memory for pieces")


def _from_rl(checkpoint: Checkpoint) -> bool:
    card = checkpoint.path / "README.md"
    return card.is_file() and "- grpo" in card.read_text(errors="replace").lower()
