"""The probe's records of the prompts that GRPO trains on, and what training saw of each since."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from trl_ext_probing.intervals import Floats, clopper_pearson
from trl_ext_probing.reachability.finished import merge_duplicates, read_finished
from trl_ext_probing.reachability.keys import prompt_number
from trl_ext_probing.reachability.routing import HOPELESS, ROUTES, Budget, Route, choose_route
from trl_ext_probing.reachability.statistics import BetaPrior


class Prompts:
    """The probe's records by prompt, and what training saw of each since.

    Args:
        folder: the probe's output.

    Raises:
        ValueError: there is no finished measurement.
    """

    def __init__(self, folder: Path) -> None:
        summary, found = read_finished(folder, "reachability: probe")
        settings: dict[str, Any] = summary["settings"]
        records = {prompt_number(record["key"]): record for record in merge_duplicates(found, settings)}
        self._folder = folder
        self.settings = settings
        self.index = {number: i for i, number in enumerate(records)}
        self.routes: list[Route] = [record["route"] for record in records.values()]
        self.worst_steps = [r["worst_token"] if r["demonstration_correct"] else None for r in records.values()]
        self._probed = np.array([[record["successes"], record["rollouts"]] for record in records.values()]).T
        self._prior = BetaPrior(*summary["prior"])
        self.draws = np.zeros(len(records), dtype=np.int64)
        self.successes = np.zeros(len(records), dtype=np.int64)
        self.recent = np.zeros((2, len(records)), dtype=np.int64)
        """Successes and draws since the route was last chosen."""

    @property
    def rates(self) -> Floats:
        """(prompts,) success rates as the probe found them, drawn towards those of all prompts where it saw little."""
        return self._prior.mean(*self._probed)

    def places(self, numbers: Iterable[int]) -> list[int]:
        """Place of each prompt, given as `keys.prompt_number`.

        Raises:
            ValueError: the probe did not see one of them.
        """
        numbers = list(numbers)
        missing = sum(number not in self.index for number in numbers)
        if missing:
            raise ValueError(
                f"{missing} of {len(numbers)} prompts are not among those that the probe in {self._folder} saw; probe "
                "the training set of this run"
            )
        return [self.index[number] for number in numbers]

    def add(self, rows: np.ndarray, solved: np.ndarray) -> None:
        """Count completions: (n,) places of their prompts, and (n,) whether they are correct."""
        np.add.at(self.draws, rows, 1)
        np.add.at(self.successes, rows, solved)
        np.add.at(self.recent[0], rows, solved)
        np.add.at(self.recent[1], rows, 1)

    def reroute(self, budget: Budget, confidence: float) -> None:
        """Choose the routes of the prompts seen since the last time by what was seen.

        A prompt without hope of a success keeps its route until it has one: to show that again by failures alone takes
        more draws than the whole budget, and fewer would make it marginal.
        """
        successes, draws = self.recent
        low, high = clopper_pearson(successes, draws, confidence)
        for i in np.flatnonzero(draws):
            if self.routes[i] in HOPELESS and successes[i] == 0:
                continue
            p = float(successes[i] / draws[i])
            self.routes[i] = choose_route(p, float(low[i]), float(high[i]), budget, self.worst_steps[i])
            self.recent[:, i] = 0

    def outcome(self) -> dict[str, float]:
        """Predicted and observed share of the prompts drawn so far that were solved, and the prediction's Brier score.

        Predicted from the probe's rollouts and the number of draws, as if the policy stayed what it was: what the
        observed share has beyond it was learned.
        """
        seen = np.flatnonzero(self.draws)
        if not len(seen):
            return {}
        counts, trials = self._probed[:, seen]
        predicted = self._prior.reached(counts, trials, self.draws[seen])
        solved = self.successes[seen] > 0
        return {
            "predicted_solved": float(predicted.mean()),
            "observed_solved": float(solved.mean()),
            "brier": float(((predicted - solved) ** 2).mean()),
        }

    def state_dict(self) -> dict[str, Any]:
        """Counts and routes, in the probe's order."""
        return {
            "draws": torch.from_numpy(self.draws.copy()),
            "successes": torch.from_numpy(self.successes.copy()),
            "recent": torch.from_numpy(self.recent.copy()),
            "routes": torch.tensor([ROUTES.index(route) for route in self.routes]),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back.

        Raises:
            ValueError: they are of another probe.
        """
        if len(state["draws"]) != len(self.draws):
            raise ValueError(
                f"the checkpoint counts {len(state['draws'])} prompts, the probe in {self._folder} has "
                f"{len(self.draws)}; give the probe of the run that is continued"
            )
        self.draws[:] = state["draws"].numpy()
        self.successes[:] = state["successes"].numpy()
        self.recent[:] = state["recent"].numpy()
        self.routes[:] = [ROUTES[i] for i in state["routes"].tolist()]
