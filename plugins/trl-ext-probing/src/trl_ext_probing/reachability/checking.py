"""One measurement's prediction against another one's rollouts, of the same prompts or of others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trl_ext.errors import ConfigurationError
from trl_ext_probing.reachability.calibration import BINS, score_calibration
from trl_ext_probing.reachability.finished import add_counts, read_finished
from trl_ext_probing.reachability.reach_plots import draw_calibration
from trl_ext_probing.reachability.statistics import BetaPrior
from trl_ext_probing.results import without_matplotlib_say_so, write

ALIKE = ("reward", "reward_weights", "solved_at", "max_completion_length", "temperature", "top_p", "top_k")
"""Settings that decide what a success is, and so have to be the same."""


def check_against(folder: Path, other: Path) -> dict[str, Any]:
    """Write `calibration.json`, `.md` and `.png` into `folder`: its predictions against the rollouts in `other`.

    Predicted is, for each prompt of `other`, the probability of at least one success in the rollouts of its first
    round, which has the same number of them for every prompt. The rounds after it stop on account of their results,
    and would be no test. A prompt that `folder` did not measure is predicted by the distribution of success rates that
    was fitted there, which is the same for all such prompts.

    Args:
        folder: a finished measurement, which predicts.
        other: another one with another seed, which is what happened.

    Returns:
        What `calibration.json` holds: what `score_calibration` gives, and `draws` of each prompt, `unseen` prompts, and
        the two `models`.

    Raises:
        ConfigurationError: one of them is not finished, their seeds are the same, or successes mean another thing.
    """
    mine, records = read_finished(folder, "--output")
    observed_settings = comparable(mine["settings"], other)
    theirs, other_records = read_finished(other, "--check-against")
    probed = add_counts(records)
    observed = add_counts(other_records, first_round=True)
    counts = np.array([probed.get(key, (0, 0)) for key in observed]).T
    draws = np.array([drawn for _, drawn in observed.values()])
    predicted = BetaPrior(*mine["prior"]).reached(counts[0], counts[1], draws)
    result = {
        **score_calibration(predicted, [solved > 0 for solved, _ in observed.values()]),
        "draws": observed_settings["n"],
        "unseen": sum(key not in probed for key in observed),
        "models": [mine["model"], theirs["model"]],
    }
    text = describe_calibration(result)
    write(folder / "calibration.json", json.dumps(result, indent=1) + "\n")
    write(folder / "calibration.md", text)
    print(text, end="")
    with without_matplotlib_say_so("calibration.png"):
        draw_calibration(result, folder / "calibration.png")
    return result


def comparable(settings: Mapping[str, Any], other: Path) -> dict[str, Any]:
    """The settings of a finished measurement, if its rollouts are a test for one with the settings given.

    Raises:
        ConfigurationError: they are not, and why.
    """
    theirs: dict[str, Any] = read_finished(other, "--check-against")[0]["settings"]
    differing = [name for name in ALIKE if settings[name] != theirs[name]]
    if differing:
        raise ConfigurationError(
            f"{other} was measured with another {' and '.join(differing)}; a comparison needs the same, so that a "
            "success is the same"
        )
    if settings["seed"] == theirs["seed"]:
        raise ConfigurationError(
            f"{other} has the same seed, so that its rollouts may be the same; measure it with another"
        )
    return theirs


def describe_calibration(result: Mapping[str, Any]) -> str:
    """The result of `check_against` in Markdown."""
    skill = "-" if result["skill"] is None else f"{result['skill']:.3f}"
    share, brier = result["observed_share_if_calibrated"], result["brier_if_calibrated"]
    lines = [
        "# Predicted against observed",
        "",
        f"{result['prompts']:,} prompts with {result['draws']} rollouts each, of which {result['unseen']:,} were not "
        "measured before;",
        "the prediction is the probability of at least one success.",
        "",
        "| | observed | 95 % of the time, if calibrated |",
        "|---|---|---|",
        f"| share solved; predicted {result['predicted_share']:.1%} | {result['observed_share']:.1%} "
        f"| {share[0]:.1%} to {share[1]:.1%} |",
        f"| Brier score | {result['brier']:.4f} | {brier[0]:.4f} to {brier[1]:.4f} |",
        f"| Brier score of the best constant | {result['brier_constant']:.4f} | |",
        f"| skill, 1 - Brier score / that of the constant | {skill} | |",
        f"| expected calibration error, {BINS} bins of equal width | {result['ece']:.4f} "
        f"| up to {result['ece_if_calibrated']:.4f} |",
        "",
        "| predicted | prompts | mean predicted | observed | 95 % bounds |",
        "|---|---|---|---|---|",
        *(
            f"| {b['from']:.1f} to {b['to']:.1f} | {b['prompts']:,} | {b['predicted']:.3f} | {b['observed']:.3f} "
            f"| {b['low']:.3f} to {b['high']:.3f} |"
            for b in result["bins"]
        ),
    ]
    if len(set(result["models"])) > 1:
        lines += ["", f"Predicted for {result['models'][0]}, observed of {result['models'][1]}."]
    return "\n".join([*lines, ""])
