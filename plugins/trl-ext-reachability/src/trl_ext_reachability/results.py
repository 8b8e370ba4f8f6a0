"""Tables, JSON and pictures of a measurement."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from trl_ext_reachability.measuring import Measurement
from trl_ext_reachability.routing import ADVICE, ROUTES
from trl_ext_reachability.statistics import fit_prior, likelihood_quantile

CURVE = tuple(i / 100 for i in range(101))
"""Shares of the prompts at which the quantile curves are kept."""
FORMAT = 1


def summarize(measurement: Measurement, prompts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Routes, curves and the predicted solved share. Logarithms are natural; null stands for the logarithm of 0."""
    settings = measurement.settings
    trials, successes = measurement.trials, measurement.successes
    prior = fit_prior(successes, trials)
    with np.errstate(divide="ignore"):
        curves = {"rollouts": likelihood_quantile(np.log(successes / trials), CURVE)}
        shown = measurement.demonstrated
        if shown.any():
            curves["demonstrations"] = likelihood_quantile(measurement.log_likelihoods[shown], CURVE)
            curves["worst_tokens"] = likelihood_quantile(np.log(measurement.worst[shown, 0]), CURVE)
    reached = prior.reached(successes, trials, settings.budget.draws)
    return {
        "format": FORMAT,
        "settings": asdict(settings),
        "prompts": len(prompts),
        "rollouts": int(trials.sum()),
        "success_rate": float((successes / trials).mean()),
        "routes": {route: sum(record["route"] == route for record in prompts) for route in ROUTES},
        "predicted_solved_share": float(reached.mean()),
        "prior": list(prior),
        "informative_group": float(np.mean([record["informative_group"] for record in prompts])),
        "demonstrations_refused": int((shown & ~measurement.correct).sum()),
        "curve_shares": list(CURVE),
        "log_quantiles": {
            name: [float(value) if np.isfinite(value) else None for value in curve] for name, curve in curves.items()
        },
    }


def write_results(measurement: Measurement, output: Path) -> None:
    """Write `prompts.jsonl`, `reachability.md`, `reachability.png` and, last, `reachability.json`.

    Where the data set has demonstrations, `demonstrations.jsonl` gets those of the prompts with that route, for SFT.

    The same measurement gives the same bytes.
    """
    prompts = measurement.prompts()
    summary = summarize(measurement, prompts)
    (output / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in prompts))
    if measurement.demonstrated.any():
        chosen = [measurement.rows[record["row"]] for record in prompts if record["route"] == "demonstration"]
        lines = [json.dumps({name: row[name] for name in ("prompt", "completion")}) + "\n" for row in chosen]
        (output / "demonstrations.jsonl").write_text("".join(lines))
    (output / "reachability.md").write_text(describe(summary))
    try:
        from trl_ext_reachability.drawing import draw_reachability
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("no picture: matplotlib is not installed (pip install 'trl-ext-reachability[plot]')")
    else:
        draw_reachability(summary, prompts, output / "reachability.png")
    (output / "reachability.json").write_text(json.dumps(summary, indent=1) + "\n")


def describe(summary: Mapping[str, Any]) -> str:
    """The summary in Markdown."""
    settings = summary["settings"]
    draws = max(1, round(settings["num_generations"] * settings["epochs"]))
    total = summary["prompts"]
    lines = [
        f"# Reach of {settings['model']} on {settings['dataset']}",
        "",
        f"{total:,} prompts, {summary['rollouts']:,} rollouts; mean success rate {summary['success_rate']:.4f}.",
        f"Budget: {settings['num_generations']} generations x {settings['epochs']:g} epochs = {draws} draws a prompt.",
        "",
        "| route | prompts | share | advice |",
        "|---|---|---|---|",
        *(f"| {r} | {n:,} | {n / total:.1%} | {ADVICE[r]} |" for r, n in summary["routes"].items()),
        "",
        f"Predicted share of prompts solved at least once within the budget: {summary['predicted_solved_share']:.1%}",
        "(from a beta distribution of success rates fitted to all prompts; without learning between prompts).",
        f"Groups with both a success and a failure at the start: {summary['informative_group']:.1%}.",
    ]
    if summary["demonstrations_refused"]:
        lines += [
            "",
            f"{summary['demonstrations_refused']:,} demonstrations are not a success by the reward function: their "
            "likelihood is no lower bound of the success rate and was not used as one.",
        ]
    levels = (0.05, 0.25, 0.5, 0.75, 0.95)
    lines += [
        "",
        "Likelihood quantiles Q(eps): all but the share eps of the prompts have at least this probability.",
        "",
        "| | " + " | ".join(f"eps {level:g}" for level in levels) + " |",
        "|---" * (len(levels) + 1) + "|",
    ]
    names = {"rollouts": "success rate", "demonstrations": "demonstration", "worst_tokens": "its worst token"}
    for name, curve in summary["log_quantiles"].items():
        cells = [curve[round(level * (len(curve) - 1))] for level in levels]
        shown = ["0" if cell is None else f"{np.exp(cell):.3g}" for cell in cells]
        lines.append(f"| {names[name]} | " + " | ".join(shown) + " |")
    return "\n".join([*lines, ""])
