"""A finished measurement, read back from its folder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_ext.errors import ConfigurationError
from trl_ext_probing.intervals import clopper_pearson
from trl_ext_probing.reachability.routing import Budget, choose_route, confidence_per_look, schedule
from trl_ext_probing.results import read_results, read_rows

Record = dict[str, Any]
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("rollouts", "successes", "first_rollouts", "first_successes"), int),
    **dict.fromkeys(("low", "high", "worst_token"), float),
    **dict.fromkeys(("key", "route"), str),
    "demonstration_correct": lambda text: text == "True",
}


def read_finished(folder: Path, setting: str) -> tuple[dict[str, Any], list[Record]]:
    """The settings of a measurement of one model with what it found as a whole, and its records of the prompts.

    Args:
        folder: The probe's output.
        setting: What holds the folder, for the message: "reachability: probe".

    Raises:
        ConfigurationError: There is no finished measurement, or it is of several models.
    """
    content = read_results(folder, "reachability", setting)
    if len(content["models"]) > 1:
        raise ConfigurationError(
            f"{setting}: {str(folder)!r} is of {len(content['models'])} models; probe the one that is trained alone"
        )
    return {**content, **content["models"][0]}, read_rows(folder, _KINDS)


def add_counts(records: Sequence[Record], first_round: bool = False) -> dict[str, tuple[int, int]]:
    """Successes and rollouts by prompt, in order of appearance; rows with the same prompt together."""
    counts: dict[str, tuple[int, int]] = {}
    names = ("first_successes", "first_rollouts") if first_round else ("successes", "rollouts")
    for record in records:
        before = counts.get(record["key"], (0, 0))
        counts[record["key"]] = before[0] + record[names[0]], before[1] + record[names[1]]
    return counts


def merge_duplicates(records: Sequence[Record], settings: Mapping[str, Any]) -> list[Record]:
    """One record per prompt, in order of appearance: training cannot tell rows with the same prompt apart.

    Their rollouts are added up, and bounds and route follow from the sums. The demonstration is the correct one with
    the best worst token; its likelihood bounds no rate here, since rows with other answers may not accept it.

    Args:
        records: of `read_finished`.
        settings: those of the measurement.
    """
    alike: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        alike[record["key"]].append(record)
    return [group[0] if len(group) == 1 else _merge(group, settings) for group in alike.values()]


def _merge(group: Sequence[Record], settings: Mapping[str, Any]) -> Record:
    ((successes, rollouts),) = add_counts(group).values()
    looks = len(schedule(settings["n"], settings["max_rollouts"]))
    bounds = clopper_pearson(successes, rollouts, confidence_per_look(settings["confidence"], looks))
    low, high = map(float, bounds)
    worst = max((record["worst_token"] for record in group if record["demonstration_correct"]), default=None)
    budget = Budget(settings["num_generations"], settings["epochs"])
    return {
        "key": group[0]["key"],
        "successes": successes,
        "rollouts": rollouts,
        "low": low,
        "high": high,
        "demonstration_correct": None if worst is None else True,
        "worst_token": worst,
        "route": choose_route(successes / rollouts, low, high, budget, worst),
    }
