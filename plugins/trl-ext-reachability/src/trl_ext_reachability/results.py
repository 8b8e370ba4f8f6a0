"""Tables, JSON and pictures of a measurement."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trl_ext_reachability.measuring import Measurement
from trl_ext_reachability.pictures import if_matplotlib
from trl_ext_reachability.routing import ADVICE, ROUTES, Budget
from trl_ext_reachability.statistics import likelihood_quantile

CURVE = tuple(i / 100 for i in range(101))
"""Shares of the prompts at which the quantile curves are kept."""
LABELS = {"rollouts": "success rate", "demonstrations": "demonstration", "worst_tokens": "its worst token"}
"""What the quantile curves are of."""


def summarize(measurement: Measurement, prompts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Routes, curves and the predicted solved share. Logarithms are natural; null stands for the logarithm of 0."""
    settings = measurement.settings
    trials, successes = measurement.trials, measurement.successes
    prior = measurement.prior
    with np.errstate(divide="ignore"):
        curves = {"rollouts": likelihood_quantile(np.log(successes / trials), CURVE)}
        shown = measurement.demonstrated
        if shown.any():
            curves["demonstrations"] = likelihood_quantile(measurement.log_likelihoods[shown], CURVE)
            curves["worst_tokens"] = likelihood_quantile(np.log(measurement.worst[shown, 0]), CURVE)
    reached = prior.reached(successes, trials, settings.budget.draws)
    return {
        "settings": settings.as_dict(),
        "prompts": len(prompts),
        "rollouts": int(trials.sum()),
        "rounds": settings.totals,
        "closing_rollouts": settings.closing_rollouts,
        "closes": settings.closes,
        "success_rate": float((successes / trials).mean()),
        "routes": {route: sum(record["route"] == route for record in prompts) for route in ROUTES},
        "predicted_solved_share": float(reached.mean()),
        "prior": list(prior),
        "informative_group": float(np.mean([record["informative_group"] for record in prompts])),
        "demonstrations_too_long": int(measurement.too_long.sum()),
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
    if (measurement.demonstrated | measurement.too_long).any():
        chosen = [measurement.rows[record["row"]] for record in prompts if record["route"] == "demonstration"]
        lines = [json.dumps({name: row[name] for name in ("prompt", "completion")}) + "\n" for row in chosen]
        (output / "demonstrations.jsonl").write_text("".join(lines))
    (output / "reachability.md").write_text(describe(summary))
    with if_matplotlib():
        from trl_ext_reachability.drawing import draw_reachability

        draw_reachability(summary, prompts, output / "reachability.png")
    (output / "reachability.json").write_text(json.dumps(summary, indent=1) + "\n")


def describe(summary: Mapping[str, Any]) -> str:
    """The summary in Markdown."""
    settings = summary["settings"]
    draws = Budget(settings["num_generations"], settings["epochs"]).draws
    total = summary["prompts"]
    lines = [
        f"# Reach of {settings['model']} on {settings['dataset']}",
        "",
        f"{total:,} prompts, {summary['rollouts']:,} rollouts; mean success rate {summary['success_rate']:.4f}.",
        f"Budget: {settings['num_generations']} generations x {settings['epochs']:g} epochs = {draws} draws a prompt.",
        *_limit(summary),
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
    if summary["demonstrations_too_long"]:
        lines += [
            "",
            f"{summary['demonstrations_too_long']:,} demonstrations have more tokens than a completion "
            f"({settings['max_completion_length']}), so that training cannot draw them: they were not used. Raise "
            "--max-completion-length, as in training, to use them.",
        ]
    levels = (0.05, 0.25, 0.5, 0.75, 0.95)
    lines += [
        "",
        "Likelihood quantiles Q(eps): all but the share eps of the prompts have at least this probability.",
        "",
        "| | " + " | ".join(f"eps {level:g}" for level in levels) + " |",
        "|---" * (len(levels) + 1) + "|",
    ]
    for name, curve in summary["log_quantiles"].items():
        cells = [curve[round(level * (len(curve) - 1))] for level in levels]
        shown = ["0" if cell is None else f"{np.exp(cell):.3g}" for cell in cells]
        lines.append(f"| {LABELS[name]} | " + " | ".join(shown) + " |")
    return "\n".join([*lines, ""])


def _limit(summary: Mapping[str, Any]) -> list[str]:
    """Up to which number of rollouts a prompt was asked for a success, and whether failures alone say something."""
    limit, enough = summary["rounds"][-1], summary["closing_rollouts"]
    lines = [f"Limit: {limit:,} rollouts a prompt, looked at after {', '.join(map(str, summary['rounds']))}."]
    if not summary["closes"]:
        lines += [
            "",
            f"Warning: {limit:,} failures in {limit:,} rollouts do not show that a success is out of reach, so that no "
            f"prompt is process_reward, demonstration or out_of_reach. That takes {enough:,}: set --max-rollouts "
            f"{enough}, or leave it out.",
        ]
    return lines
