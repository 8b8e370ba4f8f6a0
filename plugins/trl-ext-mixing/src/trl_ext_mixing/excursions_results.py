"""The table and the picture of `trl-ext probe excursions`, from what the probes have written so far."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MODELS = "models.json"
"""In the folder of a checkpoint, once it is measured: recipe to model."""


def slug(name: str) -> str:
    """A name for a folder: the end of a long path tells checkpoints apart."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")[-100:]


def write_results(output_dir: Path, folders: Mapping[str, Path], recipes: Sequence[str]) -> None:
    """Write `results.json`, `table.md` and, with matplotlib, `plot.png`; print the table.

    Args:
        output_dir: where to.
        folders: checkpoint to its folder, in the order of pre-training; all of them measured.
        recipes: `base` first.
    """
    rows = [row for checkpoint, folder in folders.items() for row in results_of(checkpoint, folder, recipes)]
    (output_dir / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    table = as_table(rows)
    (output_dir / "table.md").write_text(table)
    print(table)
    try:
        draw(rows, recipes, output_dir / "plot.png")
    except ImportError:
        print("no plot.png: it needs matplotlib (pip install 'trl-ext[plot]')")


def results_of(checkpoint: str, folder: Path, recipes: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each recipe of a checkpoint that has been measured."""
    models = json.loads((folder / MODELS).read_text())
    entries = json.loads((folder / "passk.jsonl.summary.json").read_text())["models"]
    by_model = {entry["model"]: entry for entry in entries}
    rows = []
    for recipe in recipes:
        entry, drift = by_model[models[recipe]], folder / f"drift.{slug(recipe)}.json"
        rows.append(
            {
                "checkpoint": checkpoint,
                "recipe": recipe,
                "model": models[recipe],
                "pass@k": entry["pass@k"],
                "difference_from_base": entry.get("difference_from_first"),
                "drift": json.loads(drift.read_text())["nll"] if drift.exists() else None,
            }
        )
    return rows


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """In Markdown: pass@k in percent, the change of the general nll, each with its interval."""
    ks = list(rows[0]["pass@k"]) if rows else []
    head = ["checkpoint", "recipe", *(f"pass@{k}" for k in ks), "change of general nll"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        estimates = [row["pass@k"][k] for k in ks]
        cells = [f"{100 * e['mean']:.1f} [{100 * e['low']:.1f}, {100 * e['high']:.1f}]" for e in estimates]
        change = row["drift"]
        cells.append(f"{change['change']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]" if change else "")
        lines.append(f"| {row['checkpoint']} | {row['recipe']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Mapping[str, Any]], recipes: Sequence[str], path: Path) -> None:
    """pass@k and drift against the checkpoints, a line for each recipe.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    checkpoints = list(dict.fromkeys(row["checkpoint"] for row in rows))
    ks = list(rows[0]["pass@k"])
    figure = Figure(figsize=(4 * (len(ks) + 1), 3.6), layout="tight")
    axes = figure.subplots(1, len(ks) + 1)
    for recipe in recipes:
        own = [row for row in rows if row["recipe"] == recipe]
        x = [checkpoints.index(row["checkpoint"]) for row in own]
        for axis, k in zip(axes, ks, strict=False):
            _line(axis, x, [row["pass@k"][k] for row in own], "mean", recipe)
        moved = [(i, row["drift"]) for i, row in zip(x, own, strict=True) if row["drift"]]
        _line(axes[-1], [i for i, _ in moved], [change for _, change in moved], "change", recipe)
    for axis, title in zip(axes, [*(f"pass@{k}" for k in ks), "change of general nll"], strict=True):
        axis.set_title(title)
        axis.set_xticks(range(len(checkpoints)), [Path(name).name for name in checkpoints], rotation=20)
    axes[0].legend()
    figure.savefig(path, dpi=120)


def _line(axis: Any, x: Sequence[int], estimates: Sequence[Mapping[str, float]], value: str, label: str) -> None:
    y = [e[value] for e in estimates]
    low = [v - e["low"] for v, e in zip(y, estimates, strict=True)]
    high = [e["high"] - v for v, e in zip(y, estimates, strict=True)]
    axis.errorbar(x, y, (low, high), marker="o", capsize=3, label=label)
