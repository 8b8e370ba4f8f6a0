"""The summary of a measurement in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from trl_ext_reachability.reach_summary import LABELS
from trl_ext_reachability.routing import ADVICE, Budget


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
