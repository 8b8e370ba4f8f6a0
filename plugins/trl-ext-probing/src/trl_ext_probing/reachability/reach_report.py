"""The results of `reachability` in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from trl_ext_probing.intervals import Estimate
from trl_ext_probing.reachability.reach_settings import ReachabilitySettings
from trl_ext_probing.reachability.reach_summary import LABELS
from trl_ext_probing.reachability.routing import ADVICE
from trl_ext_probing.tables import percent, table

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)


def describe(settings: ReachabilitySettings, content: Mapping[str, Any]) -> str:
    """Routes and predictions of every model side by side, then the likelihood quantiles of each."""
    models, total = content["models"], content["prompts"]
    head = ["route", *(m["model"] for m in models), "advice"]
    routes = [
        [route, *(f"{m['routes'][route]:,} ({m['routes'][route] / total:.1%})" for m in models), advice]
        for route, advice in ADVICE.items()
    ]
    return "\n".join(
        [
            f"# Reach on {settings.dataset}",
            "",
            f"{total:,} prompts. Budget: {settings.num_generations} generations x {settings.epochs:g} epochs = "
            f"{settings.budget.draws} draws a prompt.",
            f"Limit: {content['rounds'][-1]:,} rollouts a prompt, looked at after "
            f"{', '.join(map(str, content['rounds']))}.",
            *_warning(content),
            "",
            table(head, routes),
            table(["", *(m["model"] for m in models)], _predictions(models)),
            "Predicted from a beta distribution of success rates fitted to all prompts, without learning between them.",
            *(note for m in models for note in _notes(settings, m)),
            "",
            "Likelihood quantiles Q(eps): all but the share eps of the prompts have at least this probability.",
            "",
            table(["model", "of", *(f"eps {level:g}" for level in LEVELS)], _quantiles(models)),
        ]
    )


def _predictions(models: list[dict[str, Any]]) -> Iterator[list[str]]:
    yield ["rollouts", *(f"{m['rollouts']:,}" for m in models)]
    yield ["mean success rate", *(f"{m['success_rate']:.4f}" for m in models)]
    if len(models) > 1:
        differences = (Estimate(**m["difference_from_first"]) for m in models[1:])
        yield ["minus the first, in the first round (%)", "", *(percent(d, "+") for d in differences)]
    shares = (f"{m['predicted_solved_share']:.1%}" for m in models)
    yield ["predicted share of prompts solved at least once within the budget", *shares]
    groups = (f"{m['informative_group']:.1%}" for m in models)
    yield ["groups with both a success and a failure at the start", *groups]


def _quantiles(models: list[dict[str, Any]]) -> Iterator[list[str]]:
    for m in models:
        for name, curve in m["log_quantiles"].items():
            cells = [curve[round(level * (len(curve) - 1))] for level in LEVELS]
            yield [m["model"], LABELS[name], *(f"{np.exp(cell):.3g}" for cell in cells)]


def _notes(settings: ReachabilitySettings, model: Mapping[str, Any]) -> Iterator[str]:
    if model["demonstrations_refused"]:
        yield (
            f"{model['model']}: {model['demonstrations_refused']:,} demonstrations are not a success by the reward "
            "function: their likelihood is no lower bound of the success rate and was not used as one."
        )
    if model["demonstrations_too_long"]:
        yield (
            f"{model['model']}: {model['demonstrations_too_long']:,} demonstrations have more tokens than a completion "
            f"({settings.max_completion_length}), so that training cannot draw them: they were not used. Raise "
            "--max-completion-length, as in training, to use them."
        )


def _warning(content: Mapping[str, Any]) -> list[str]:
    """Whether failures alone say something."""
    limit, enough = content["rounds"][-1], content["closing_rollouts"]
    if content["closes"]:
        return []
    return [
        "",
        f"Warning: {limit:,} failures in {limit:,} rollouts do not show that a success is out of reach, so that no "
        f"prompt is process_reward, demonstration or out_of_reach. That takes {enough:,}: set --max-rollouts "
        f"{enough}, or leave it out.",
    ]
