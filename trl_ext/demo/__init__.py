"""`trl-ext demo`: noisy demonstrations, NLL against `power`, each with and without `ema`.

A small model learns a procedural arithmetic task from right demonstrations, and is then fine-tuned on a few of which
half are wrong. Held-out exact match, over several seeds, says how much of the task is left after each run.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from trl_ext.demo.settings import QUICK, RUNS, Settings
from trl_ext.errors import ConfigurationError

_NEEDED = {
    "matplotlib": "matplotlib",
    "trl_ext_objectives": "trl-ext-objectives",
    "trl_ext_averaging": "trl-ext-averaging",
}


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
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # The runs write their output to files of their own.
    with Progress(*columns, console=console, redirect_stdout=False, redirect_stderr=False) as progress:
        task = progress.add_task("loading torch and TRL", total=1 + settings.seeds * len(RUNS))
        with _quiet_and_repeatable():
            from trl_ext.demo.experiment import Experiment

            experiment = Experiment(settings, folder)
            progress.update(task, description="base model")
            base = experiment.train_base()
            progress.advance(task)
            console.print(f"base model: {base:.1%} of the held-out answers are right")
            scores: dict[str, list[float]] = {name: [] for name in RUNS}
            curves: dict[str, list[dict[int, float]]] = {name: [] for name in RUNS}
            for seed in range(settings.seeds):
                for name, plugins in RUNS.items():
                    progress.update(task, description=f"{name}, seed {seed}")
                    score, nll = experiment.fine_tune(name, plugins, seed)
                    scores[name].append(score)
                    curves[name].append(nll)
                    progress.advance(task)
                    console.print(f"{name}, seed {seed}: {score:.1%}")
        progress.update(task, description="done")
    runs = {
        name: {
            "plugins": plugins,
            "exact_match": scores[name],
            "held_out_nll": {str(step): [nll[step] for nll in curves[name]] for step in curves[name][0]},
        }
        for name, plugins in RUNS.items()
    }
    return {"settings": asdict(settings), "base": base, "runs": runs}


@contextmanager
def _quiet_and_repeatable() -> Iterator[None]:
    """No progress bars but ours, and one thread, which makes sums come out alike whatever the number of cores."""
    import datasets
    import torch
    from transformers.utils import logging

    threads, bars = torch.get_num_threads(), (datasets.are_progress_bars_disabled(), logging.is_progress_bar_enabled())
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers about TRL's arguments
            yield
    finally:
        torch.set_num_threads(threads)
        if not bars[0]:
            datasets.enable_progress_bars()
        if bars[1]:
            logging.enable_progress_bar()


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
