"""The run of `drift`, and its results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trl_ext.errors import ConfigurationError
from trl_ext_probing.drift.drift_settings import DriftSettings
from trl_ext_probing.intervals import Estimate, ratio_with_interval
from trl_ext_probing.plots import GREY, draw_estimates, figure, save, short_names
from trl_ext_probing.results import write_results
from trl_ext_probing.scored_data import Data, Scores, score_models
from trl_ext_probing.tables import shown, table

MEASURES = {"nll": ("sum_nll", "nll (nats per token)"), "accuracy": ("hits", "next-token accuracy")}
"""Name to the column of scores that it is the mean of, and what a reader calls it."""


@dataclass(frozen=True)
class Change:
    """A mean per label token before and after, and the change with its interval over examples."""

    before: float
    after: float
    change: Estimate


def run(settings: DriftSettings) -> dict[str, dict[str, Change]]:
    """Score the data under all models, and write the results.

    Returns:
        Model to measure to change.

    Raises:
        ConfigurationError: The data or a model cannot be used, or the base is among the models.
    """
    if settings.base in settings.model:
        raise ConfigurationError(f"--model {settings.base!r} is --base; a model has not drifted from itself")
    data = Data(settings)
    base, *others = score_models(settings, [settings.base, *settings.model], data)
    changes = {scores.model: compare(base, scores, settings.confidence) for scores in others}
    write_drift(settings, base, others, changes)
    return changes


def compare(before: Scores, after: Scores, confidence: float = 0.95) -> dict[str, Change]:
    """Change of the mean NLL and accuracy per label token, on the same examples before and after.

    Raises:
        ValueError: The two have other label tokens, or fewer than two examples have one.
    """
    tokens = before.column("tokens")
    if tokens.tolist() != after.column("tokens").tolist():
        raise ValueError("before and after have other label tokens; the two models need one tokenizer")
    found = {}
    for name, (column, _) in MEASURES.items():
        x, y = before.column(column), after.column(column)
        change = ratio_with_interval(y - x, tokens, confidence)
        found[name] = Change(float(x.sum() / tokens.sum()), float(y.sum() / tokens.sum()), change)
    return found


def write_drift(
    settings: DriftSettings, base: Scores, others: Sequence[Scores], changes: dict[str, dict[str, Change]]
) -> None:
    """Write the results of all models."""
    tokens = base.column("tokens")
    models = [
        {"model": s.model, "weights": s.about["weights"]}
        | {name: asdict(change) for name, change in changes[s.model].items()}
        for s in others
    ]
    content = {
        "data": base.about["data"],
        "base": {"model": base.model, "weights": base.about["weights"]},
        "label_tokens": int(tokens.sum()),
        "without_labels": int((tokens == 0).sum()),
        "models": models,
    }
    rows = (
        {"model": s.model, "example": i, "tokens": int(t), "nll": float(nll), "hits": int(hits)}
        for s in (base, *others)
        for i, (t, nll, hits) in enumerate(zip(tokens, s.column("sum_nll"), s.column("hits"), strict=True))
    )
    write_results(
        settings, content, rows, describe(settings, base, changes), lambda path: draw(settings, changes, path)
    )


def describe(settings: DriftSettings, base: Scores, changes: dict[str, dict[str, Change]]) -> str:
    """Before, after and the change of each measure."""
    lines = [
        [model, name, f"{change.before:.4f}", f"{change.after:.4f}", shown(change.change, 4, "+")]
        for model, of_model in changes.items()
        for name, change in of_model.items()
    ]
    tokens = base.column("tokens")
    left = int((tokens == 0).sum())
    notes = [
        f"Change from {base.model} per label token, with {settings.confidence:.0%} intervals over "
        f"{len(tokens) - left} examples of {int(tokens.sum()):,} label tokens; nll in nats."
    ]
    if left:
        notes.append(f"{left} of {len(tokens)} examples have no token to score and are left out.")
    return "\n".join([table(["model", "measure", "before", "after", "change"], lines), *notes])


def draw(settings: DriftSettings, changes: dict[str, dict[str, Change]], path: Path) -> None:
    """The change of each measure, a point for each model."""
    whole, axes = figure(len(MEASURES))
    base, *names = short_names([settings.base, *changes])
    title = f"From {base}; {settings.confidence:.0%} intervals over examples"
    places = range(len(changes))
    for axis, (name, (_, label)) in zip(axes, MEASURES.items(), strict=True):
        draw_estimates(axis, list(places), [of_model[name].change for of_model in changes.values()], 0, name, line="")
        axis.axhline(0, color=GREY, linewidth=1)
        axis.set(ylabel=f"change of {label}", title=title)
        axis.set_xticks(list(places), names, rotation=20, ha="right")
        axis.set_xlim(-0.5, len(changes) - 0.5)
    save(whole, path)
