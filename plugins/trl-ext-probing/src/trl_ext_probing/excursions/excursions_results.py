"""The results of `excursions`, of all checkpoints that are measured so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trl_ext_probing.excursions.excursions_settings import ExcursionSettings
from trl_ext_probing.intervals import Estimate
from trl_ext_probing.plots import GREY, draw_estimates, figure, save
from trl_ext_probing.results import write_results
from trl_ext_probing.tables import percent, shown, table


@dataclass(frozen=True)
class Row:
    """What a recipe made of a checkpoint."""

    checkpoint: str
    recipe: str
    model: str
    pass_at: Mapping[int, Estimate]
    """By k."""
    difference: Mapping[int, Estimate]
    """From the checkpoint itself, paired by problem."""
    drift: Estimate | None
    """Change of the nll of general data, in nats per token; None of the checkpoint itself, or without that measure."""


def write_excursions(settings: ExcursionSettings, rows: Sequence[Row]) -> None:
    """Write the results."""
    content = {
        "rows": [{**asdict(row), "pass_at": _by_k(row.pass_at), "difference": _by_k(row.difference)} for row in rows]
    }
    write_results(
        settings, content, map(_flat, rows), describe(settings, rows), lambda path: draw(settings, rows, path)
    )


def _by_k(estimates: Mapping[int, Estimate]) -> dict[str, Any]:
    return {str(k): asdict(estimate) for k, estimate in estimates.items()}


def _flat(row: Row) -> dict[str, Any]:
    named = {f"pass@{k}": estimate for k, estimate in row.pass_at.items()}
    cells = {
        f"{name} {part}": getattr(estimate, part, None)
        for name, estimate in {**named, "drift": row.drift}.items()
        for part in ("value", "low", "high")
    }
    return {"checkpoint": row.checkpoint, "recipe": row.recipe, "model": row.model, **cells}


def describe(settings: ExcursionSettings, rows: Sequence[Row]) -> str:
    """pass@k in percent and its difference to the checkpoint's, and the change of the general nll."""
    ks = list(rows[0].pass_at)
    head = ["checkpoint", "recipe", *(f"pass@{k}" for k in ks), *(f"pass@{k} - base" for k in ks), "general nll - base"]
    lines = (
        [
            row.checkpoint,
            row.recipe,
            *(percent(row.pass_at[k]) for k in ks),
            *(percent(row.difference.get(k), "+") for k in ks),
            shown(row.drift, 3, "+"),
        ]
        for row in rows
    )
    note = f"pass@k in percent, nll in nats per token; {settings.confidence:.0%} intervals over problems and examples."
    return "\n".join([table(head, lines), note])


def draw(settings: ExcursionSettings, rows: Sequence[Row], path: Path) -> None:
    """pass@k and drift against the checkpoints, a line for each recipe; recipes stand beside one another."""
    checkpoints = list(dict.fromkeys(row.checkpoint for row in rows))
    recipes = list(dict.fromkeys(row.recipe for row in rows))
    ks = list(rows[0].pass_at)
    whole, axes = figure(len(ks) + 1)
    for i, recipe in enumerate(recipes):
        own = [row for row in rows if row.recipe == recipe]
        x = [checkpoints.index(row.checkpoint) + 0.12 * (i - (len(recipes) - 1) / 2) for row in own]
        for axis, k in zip(axes, ks, strict=False):
            draw_estimates(axis, x, [row.pass_at[k] for row in own], i, recipe)
        if any(row.drift for row in own):
            draw_estimates(axes[-1], x, [row.drift for row in own], i, recipe)
    axes[-1].axhline(0, color=GREY, linewidth=1, label="base")
    labels = [*(f"pass@{k} (share of problems solved)" for k in ks), "change of general nll (nats per token)"]
    for axis, label in zip(axes, labels, strict=True):
        axis.set(ylabel=label, xlabel="checkpoint", title=f"{settings.confidence:.0%} intervals")
        axis.set_xticks(range(len(checkpoints)), [Path(name).name for name in checkpoints], rotation=20)
    axes[0].legend(fontsize=8)
    save(whole, path)
