"""The files of a comparison: `results.json`, `costs.json`, `rows.csv`, `table.md`, `plot.png` and `report.html`."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from trl_ext_probing.comparing.arm_runs import Run
from trl_ext_probing.comparing.compare_page import page
from trl_ext_probing.comparing.compare_plot import draw_comparison
from trl_ext_probing.comparing.compare_settings import CompareSettings
from trl_ext_probing.comparing.compare_summary import Found, Values, summarize
from trl_ext_probing.comparing.compare_table import describe
from trl_ext_probing.comparing.comparison import Comparison
from trl_ext_probing.results import write, write_results


def write_comparison(
    settings: CompareSettings,
    asked: Comparison,
    runs: Sequence[Run],
    values: Mapping[str, Values],
    rates: Mapping[str, float],
) -> None:
    """Write the files, and print the table.

    `results.json` holds what the models are worth, which the same file gives again however often it was interrupted;
    what differs from time to time, seconds and memory, is in `costs.json`.
    """
    base, trained = runs[0], runs[1:]
    by_arm = {arm.name: [run for run in trained if run.arm is arm] for arm in asked.arms}
    of_arms = {name: [values.get(run.name) for run in own] for name, own in by_arm.items()}
    metrics = summarize(asked, values.get(base.name, {}), of_arms, settings.confidence)
    costs = {
        name: [cost for run in own if run.name in values and (cost := run.costs) is not None]
        for name, own in by_arm.items()
    }
    found = Found(
        settings=settings,
        asked=asked,
        metrics=metrics,
        rates=rates,
        costs=costs,
        missing=[run.name for run in trained if run.name not in values],
        commands=[command for run in trained for command in run.commands],
        hardware=_hardware(asked.on_cpu),
    )
    content = {
        "file": asked.content,
        "arms": {name: _arm(own, values, rates.get(name), settings.output) for name, own in by_arm.items()},
        "metrics": {metric.name: asdict(metric) for metric in metrics},
        "missing": found.missing,
    }
    taken = {
        "hardware": found.hardware,
        "arms": {name: [asdict(cost) for cost in own] for name, own in costs.items()},
    }
    settings.output.mkdir(parents=True, exist_ok=True)
    write(settings.output / "costs.json", json.dumps(taken, indent=1) + "\n")
    draw = partial(draw_comparison, metrics, settings.confidence)
    write_results(settings, content, _rows(by_arm, values), describe(found), draw)
    write(settings.output / "report.html", page(found, settings.output / "plot.png"))


def _arm(runs: Sequence[Run], values: Mapping[str, Values], rate: float | None, output: Path) -> dict[str, Any]:
    made = [(run, run.costs) for run in runs]
    return {
        "learning_rate": rate,
        "runs": [
            {
                "seed": run.seed,
                "folder": str(run.folder.relative_to(output)),
                "commands": run.commands,
                "values": values.get(run.name),
                "steps": None if cost is None else cost.steps,
                "tokens": None if cost is None else cost.tokens,
            }
            for run, cost in made
        ],
    }


def _rows(by_arm: Mapping[str, Sequence[Run]], values: Mapping[str, Values]) -> Iterator[dict[str, Any]]:
    for arm, runs in by_arm.items():
        for run in runs:
            for metric, value in (values.get(run.name) or {}).items():
                yield {"arm": arm, "seed": run.seed, "metric": metric, "value": value}


def _hardware(on_cpu: bool) -> str:
    import torch

    if not on_cpu and torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores ({platform.processor() or platform.machine()})"
