"""What training reads of a measurement: rows with the same prompt, and routes that follow what training draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import write_measurement
from trl_ext_probing.reachability.finished import merge_duplicates
from trl_ext_probing.reachability.keys import prompt_key, prompt_number
from trl_ext_probing.reachability.routing import HOPELESS, Budget
from trl_ext_reachability.prompts import Prompts

SETTINGS = {"num_generations": 8, "epochs": 3.0, "n": 8, "max_rollouts": 128, "confidence": 0.95}
BUDGET = Budget(8, 3.0)


def record(prompt: str, successes: int, rollouts: int, route: str, **more: Any) -> dict[str, Any]:
    common = {"key": prompt_key(prompt), "demonstration_correct": None, "worst_token": None}
    return {**common, "successes": successes, "rollouts": rollouts, "route": route, **more}


def known(folder: Path, *records: dict[str, Any]) -> Prompts:
    write_measurement(folder, SETTINGS, list(records))
    return Prompts(folder)


def draw(prompts: Prompts, row: int, successes: int, draws: int) -> None:
    prompts.add(np.full(draws, row), np.arange(draws) < successes)


@pytest.mark.parametrize("route", HOPELESS)
def test_a_hopeless_prompt_stays_so_until_it_is_solved(tmp_path: Path, route: str) -> None:
    """Three epochs of 8 failures each, the whole budget, with a choice of routes after each; then a success."""
    prompts = known(tmp_path, record("a", 0, 128, route), record("b", 20, 128, "in_reach"))
    for _ in range(3):
        draw(prompts, 0, 0, 8)
        draw(prompts, 1, 0, 8)
        prompts.reroute(BUDGET, 0.95)
    assert prompts.routes == [route, "marginal"]  # 8 failures leave a rate of 0.37 possible
    assert prompts.recent[:, 0].tolist() == [0, 24]
    draw(prompts, 0, 1, 1)
    prompts.reroute(BUDGET, 0.95)
    assert prompts.routes[0] == "marginal"
    assert prompts.recent.sum() == 0


def test_rows_with_the_same_prompt_are_counted_together(tmp_path: Path) -> None:
    """64 of 64 and 0 of 64 is a rate of a half, whichever row comes last."""
    rows = [record("a", 64, 64, "saturated"), record("b", 1, 8, "marginal"), record("a", 0, 64, "out_of_reach")]
    for folder, found in (("there", rows), ("back", rows[::-1])):
        (tmp_path / folder).mkdir()
        prompts = known(tmp_path / folder, *found)
        place = prompts.places([prompt_number(prompt_key("a"))])[0]
        assert prompts.routes[place] == "in_reach"
        assert prompts.rates[place] == pytest.approx(64.5 / 130.5)
        assert sorted(prompts.routes) == ["in_reach", "marginal"]


def test_merged_rows_keep_the_best_correct_demonstration() -> None:
    hopeless = [
        record("a", 0, 125, "demonstration", demonstration_correct=True, worst_token=0.01),
        record("a", 0, 125, "process_reward", demonstration_correct=True, worst_token=0.2),
        record("a", 0, 125, "out_of_reach", demonstration_correct=False, worst_token=0.9),
    ]
    (merged,) = merge_duplicates(hopeless, SETTINGS)
    assert (merged["route"], merged["worst_token"], merged["rollouts"]) == ("process_reward", 0.2, 375)
    assert merge_duplicates(hopeless[:1], SETTINGS) == hopeless[:1]
