"""A finished measurement, read back from its folder."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_ext_reachability.routing import Budget, choose_route, confidence_per_look, schedule
from trl_ext_reachability.statistics import clopper_pearson

Record = dict[str, Any]


def read_finished(folder: Path, option: str = "") -> tuple[dict[str, Any], list[Record]]:
    """The content of `reachability.json`, and the records of `prompts.jsonl`.

    Args:
        folder: the probe's output.
        option: what stands before the folder in the error, such as `probe=`.

    Raises:
        ValueError: there is no finished measurement.
    """
    try:
        summary = json.loads((folder / "reachability.json").read_text())
        lines = (folder / "prompts.jsonl").read_text().splitlines()
    except OSError as error:
        raise ValueError(
            f"{option}{str(folder)!r} holds no finished measurement ({error}); make one with "
            "`trl-ext probe reachability`"
        ) from error
    return summary, [json.loads(line) for line in lines]


def add_counts(records: Sequence[Record]) -> dict[str, tuple[int, int]]:
    """Successes and rollouts by prompt, in order of appearance; rows with the same prompt together."""
    counts: dict[str, tuple[int, int]] = {}
    for record in records:
        successes, rollouts = counts.get(record["key"], (0, 0))
        counts[record["key"]] = successes + record["successes"], rollouts + record["rollouts"]
    return counts


def merge_duplicates(records: Sequence[Record], settings: Mapping[str, Any]) -> list[Record]:
    """One record per prompt, in order of appearance: training cannot tell rows with the same prompt apart.

    Their rollouts are added up, and bounds and route follow from the sums. The demonstration is the correct one with
    the best worst token; its likelihood bounds no rate here, since rows with other answers may not accept it.

    Args:
        records: of `prompts.jsonl`.
        settings: those of the measurement.
    """
    alike: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        alike[record["key"]].append(record)
    return [group[0] if len(group) == 1 else _merge(group, settings) for group in alike.values()]


def _merge(group: Sequence[Record], settings: Mapping[str, Any]) -> Record:
    ((successes, rollouts),) = add_counts(group).values()
    looks = len(schedule(settings["rollouts"], settings["max_rollouts"]))
    bounds = clopper_pearson(successes, rollouts, confidence_per_look(settings["confidence"], looks))
    low, high = map(float, bounds)
    shown = [record["worst_steps"] for record in group if record["demonstration_correct"]]
    worst = max(shown, default=None)
    budget = Budget(settings["num_generations"], settings["epochs"])
    return {
        "key": group[0]["key"],
        "successes": successes,
        "rollouts": rollouts,
        "low": low,
        "high": high,
        "demonstration_correct": True if worst else None,
        "worst_steps": worst,
        "route": choose_route(successes / rollouts, low, high, budget, worst[0] if worst else None),
    }
