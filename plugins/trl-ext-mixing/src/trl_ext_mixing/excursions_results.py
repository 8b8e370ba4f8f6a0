"""The table and the picture of `trl-ext probe excursions`, from what the probes have written so far."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def write_results(
    output_dir: Path, checkpoints: Sequence[str], recipes: Sequence[str], folder: Callable[..., Path]
) -> None:
    """Write `results.json`, `table.md` and, with matplotlib, `plot.png`; print the table.

    Args:
        output_dir: where to.
        checkpoints: in the order of pre-training; those without results are left out.
        recipes: `base` first.
        folder: gives the folder of a checkpoint.
    """
    rows = [row for checkpoint in checkpoints for row in results_of(checkpoint, folder(checkpoint), recipes)]
    (output_dir / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    table = as_table(rows)
    (output_dir / "table.md").write_text(table)
    print(table)
    try:
        draw(rows, recipes, output_dir / "plot.png")
    except ImportError:
        print("no plot.png: it needs matplotlib (pip install 'trl-ext[plot]')")


def results_of(checkpoint: str, folder: Path, recipes: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each recipe of a checkpoint; none where it has not been measured."""
    summary = folder / "passk.jsonl.summary.json"
    if not summary.exists():
        return []
    recipe_of = {model: recipe for recipe, model in json.loads((folder / "models.json").read_text()).items()}
    rows = []
    for entry in json.loads(summary.read_text())["models"]:
        row = {
            "checkpoint": checkpoint,
            "recipe": recipe_of[entry["model"]],
            "model": entry["model"],
            "pass@k": entry["pass@k"],
            "difference_from_base": entry.get("difference_from_first"),
        }
        drift = [path for path in folder.glob("drift.*.json") if json.loads(path.read_text())["model"] == row["model"]]
        row["drift"] = json.loads(drift[0].read_text())["nll"] if drift else None
        rows.append(row)
    return sorted(rows, key=lambda row: recipes.index(row["recipe"]))


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
