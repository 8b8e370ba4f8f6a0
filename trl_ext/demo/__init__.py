"""`trl-ext demo`: noisy demonstrations, NLL against `power`, each with and without `ema`.

A small model learns a procedural arithmetic task from right demonstrations, and is then fine-tuned on a few of which
half are wrong. Held-out exact match, over several seeds, says how much of the task is left after each run.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from trl_ext.demo.settings import QUICK, RUNS, Settings
from trl_ext.errors import ConfigurationError
from trl_ext.jobs import Job, Outcome, Pool

_NEEDED = {
    "matplotlib": "matplotlib",
    "trl_ext_objectives": "trl-ext-objectives",
    "trl_ext_averaging": "trl-ext-averaging",
}
_MOST_AT_ONCE = 4
"""Each of the processes takes 0.6 GB of memory."""


def main(output_dir: str | Path = "runs/demo", quick: bool = False) -> dict[str, Any]:
    """Run the experiment, print its table, and write `results.json`, `plot.png` and a folder per run.

    Args:
        output_dir: Folder to write to; what an earlier demo wrote there is replaced.
        quick: Make everything tiny: shows that it runs, with numbers that mean nothing.

    Returns:
        What `results.json` holds: the settings, the base model's exact match, and for each run the exact match of every
        seed, in [0, 1], and the held-out NLL of every seed in nats per token, by step.

    Raises:
        ConfigurationError: matplotlib or one of the two plugin distributions is not installed.
    """
    missing = [distribution for module, distribution in _NEEDED.items() if find_spec(module) is None]
    if missing:
        raise ConfigurationError(f"the demo needs more: pip install {' '.join(missing)}")
    started = time.perf_counter()
    settings = QUICK if quick else Settings()
    folder = Path(output_dir)
    console = Console(file=sys.stdout)
    results = _experiment(settings, folder, console)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")

    from trl_ext.demo.plot import plot

    plot(results, folder / "plot.png")
    console.print(_table(results))
    if quick:
        console.print(
            "This was a quick run: it shows that everything works, and its numbers mean nothing.", soft_wrap=True
        )
    console.print(
        f"Took {time.perf_counter() - started:.0f} s. Results, plot and runs are in {folder}.", soft_wrap=True
    )
    return results


def _experiment(settings: Settings, folder: Path, console: Console) -> dict[str, Any]:
    from trl_ext.demo.experiment import fine_tune, train_base

    def job(name: str, function: Callable[..., Any], **arguments: Any) -> Job:
        own = folder / name
        made = Job(name, own, function, {"settings": asdict(settings), "folder": own, **arguments})
        made.forget()
        return made

    base = job("base", train_base)
    runs: dict[Job, tuple[str, int]] = {}
    for seed in range(settings.seeds):
        for name, plugins in RUNS.items():
            own = f"{name.replace(' + ', '-')}-seed{seed}"
            runs[job(own, fine_tune, base=folder / "base", plugins=plugins, seed=seed)] = name, seed
    results: dict[str, dict[int, Any]] = {name: {} for name in RUNS}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Pool() as pool, Progress(*columns, console=console, redirect_stdout=False, redirect_stderr=False) as progress:
        task = progress.add_task("base model", total=1 + len(runs))
        (outcome,) = map(_succeeded, pool.run([[base]], threads=1))
        progress.advance(task)
        console.print(f"base model: {outcome.result:.1%} of the held-out answers are right")
        progress.update(task, description="fine-tuning")
        # One thread each, which makes sums come out alike whatever the number of cores.
        for finished in map(_succeeded, pool.run([[run] for run in runs], at_once=_at_once(), threads=1)):
            name, seed = runs[finished.job]
            results[name][seed] = finished.result
            progress.advance(task)
            console.print(f"{name}, seed {seed}: {finished.result['exact_match']:.1%}")
        progress.update(task, description="done")
    return {
        "settings": asdict(settings),
        "base": outcome.result,
        "runs": {name: _of_seeds(RUNS[name], [own[seed] for seed in sorted(own)]) for name, own in results.items()},
    }


def _succeeded(outcome: Outcome) -> Outcome:
    if outcome.error:
        raise RuntimeError(outcome.error)
    return outcome


def _at_once() -> int:
    return min(os.cpu_count() or 1, _MOST_AT_ONCE)


def _of_seeds(plugins: list[str], results: list[dict[str, Any]]) -> dict[str, Any]:
    """What the fine-tunings of one run came to, in the order of their seeds."""
    steps = results[0]["held_out_nll"]
    return {
        "plugins": plugins,
        "exact_match": [result["exact_match"] for result in results],
        "held_out_nll": {step: [result["held_out_nll"][step] for result in results] for step in steps},
    }


def _table(results: dict[str, Any]) -> Table:
    settings = results["settings"]
    table = Table(
        title=f"Held-out exact match after {settings['epochs']} epochs on {settings['demonstrations']} demonstrations, "
        f"{settings['noise']:.0%} of them wrong; {settings['held_out']} prompts, seeds: {settings['seeds']}",
        caption=f"plugins: {', '.join(RUNS['power + ema'])}",
    )
    table.add_column("run")
    table.add_column("mean ± sd, %", justify="right")
    table.add_column("each seed, %", justify="right")
    table.add_row("base model", f"{100 * results['base']:.1f}", "")
    for name, run in results["runs"].items():
        scores = [100 * score for score in run["exact_match"]]
        spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        each = "  ".join(f"{score:.1f}" for score in scores)
        table.add_row(name, f"{statistics.mean(scores):.1f}{spread}", each)
    return table
