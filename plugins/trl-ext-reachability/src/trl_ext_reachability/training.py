"""`reachability`: what the probe found, used in GRPO: weights by route, demonstrations, predicted against solved."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate.utils import gather
from torch import Tensor

from trl_ext import hookimpl
from trl_ext.gradients import GradientView
from trl_ext.records import Rewards, Rollouts, RunDescription, StreamGradient, StreamRequest
from trl_ext_reachability.keys import prompt_key, prompt_number
from trl_ext_reachability.routing import ROUTES, Budget, Route, choose_route
from trl_ext_reachability.statistics import BetaPrior, clopper_pearson

ROLE = "demonstrations"


class Prompts:
    """The probe's records by prompt, and what training saw of each since.

    Args:
        folder: the probe's output.

    Raises:
        ValueError: there is no finished measurement.
    """

    def __init__(self, folder: Path) -> None:
        try:
            summary = json.loads((folder / "reachability.json").read_text())
            lines = (folder / "prompts.jsonl").read_text().splitlines()
        except OSError as error:
            raise ValueError(
                f"probe={str(folder)!r} holds no finished measurement ({error}); make one with "
                "`trl-ext probe reachability`"
            ) from error
        records = {prompt_number(record["key"]): record for record in map(json.loads, lines)}
        self.settings: dict[str, Any] = summary["settings"]
        self.index = {number: i for i, number in enumerate(records)}
        self.routes: list[Route] = [record["route"] for record in records.values()]
        usable = [record["worst_steps"] if record["demonstration_correct"] else None for record in records.values()]
        self.worst_steps = [worst[0] if worst else None for worst in usable]
        self._probed = np.array([[record["successes"], record["rollouts"]] for record in records.values()]).T
        self._prior = BetaPrior(*summary["prior"])
        self.draws = np.zeros(len(records), dtype=np.int64)
        self.successes = np.zeros(len(records), dtype=np.int64)
        self.recent = np.zeros((2, len(records)), dtype=np.int64)
        """Successes and draws since the last change of routes."""

    def add(self, rows: np.ndarray, solved: np.ndarray) -> None:
        """Count completions: (n,) places of their prompts, and (n,) whether they are correct."""
        np.add.at(self.draws, rows, 1)
        np.add.at(self.successes, rows, solved)
        np.add.at(self.recent[0], rows, solved)
        np.add.at(self.recent[1], rows, 1)

    def reroute(self, budget: Budget, confidence: float) -> None:
        """Choose the routes of the prompts seen since the last time by what was seen."""
        successes, draws = self.recent
        low, high = clopper_pearson(successes, draws, confidence)
        for i in np.flatnonzero(draws):
            p = float(successes[i] / draws[i])
            self.routes[i] = choose_route(p, float(low[i]), float(high[i]), budget, self.worst_steps[i])
        self.recent[:] = 0

    def outcome(self) -> dict[str, float]:
        """Predicted and observed share of the prompts drawn so far that were solved, and the prediction's Brier score.

        Predicted from the probe's rollouts and the number of draws, as if the policy stayed what it was: what the
        observed share has beyond it was learned.
        """
        seen = np.flatnonzero(self.draws)
        if not len(seen):
            return {}
        counts, trials = self._probed[:, seen]
        # Draws differ between prompts; the prediction is for one number of draws at a time.
        draws = self.draws[seen]
        predicted = np.empty(len(seen))
        for number in np.unique(draws):
            same = draws == number
            predicted[same] = self._prior.reached(counts[same], trials[same], int(number))
        solved = self.successes[seen] > 0
        return {
            "predicted_solved": float(predicted.mean()),
            "observed_solved": float(solved.mean()),
            "brier": float(((predicted - solved) ** 2).mean()),
        }


@dataclass(eq=False)
class Reachability:
    """Weighs the advantages of each prompt by its route, and learns from demonstrations where rollouts cannot teach.

    Weights are divided by their mean over the completions of all ranks, so that the size of the update stays: a
    prompt of weight 0 hands its share to the others, although its tokens remain in TRL's denominator.

    Args:
        probe: Folder that `trl-ext probe reachability` wrote, for the prompts of this run and its group size.
        saturated, in_reach, marginal, process_reward, demonstration, out_of_reach: Weight of the advantages of
            prompts with that route.
        reroute_every: Optimiser steps after which routes follow what training itself drew since the last time; 0 for
            the probe's routes throughout.
        confidence: Of the bounds that routes are chosen by then.
        success: Reward from which a completion counts as correct.
        coefficient: Of the gradient of the optional stream "demonstrations" (SFT), which is added.
        batch_size: Its samples per rank and step.
    """

    requires_api: ClassVar[str] = "1"
    trainers: ClassVar[tuple[str, ...]] = ("grpo",)
    state_version: ClassVar[int] = 1
    citation: ClassVar[str] = (
        "Post-training with policy gradients: optimality and the base model barrier, arXiv 2603.06957"
    )

    probe: str
    saturated: float = 0.5
    in_reach: float = 1.0
    marginal: float = 1.0
    process_reward: float = 1.0
    demonstration: float = 0.0
    out_of_reach: float = 0.0
    reroute_every: int = 0
    confidence: float = 0.95
    success: float = 1.0
    coefficient: float = 0.1
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in (*ROUTES, "coefficient"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value}: at least 0")
        if not any(getattr(self, route) for route in ROUTES):
            raise ValueError(f"{', '.join(ROUTES)} are all 0: nothing would be learned from rollouts")
        if self.reroute_every < 0:
            raise ValueError(f"reroute_every={self.reroute_every}: at least 0")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence={self.confidence}: between 0 and 1")
        self._prompts = Prompts(Path(self.probe).expanduser())
        self._rerouted = 0

    @hookimpl
    def check(self, run: RunDescription) -> None:
        """Refuse another group size than the probe's."""
        probed = self._prompts.settings["num_generations"]
        if run.args.num_generations != probed:
            raise ValueError(
                f"the probe in {self.probe} is for num_generations={probed}, this run has {run.args.num_generations}; "
                "routes depend on it: probe again, or set num_generations to the probe's"
            )

    @hookimpl
    def streams(self) -> list[StreamRequest]:
        """Demonstrations, where they are given: the probe writes `demonstrations.jsonl`."""
        return [StreamRequest(ROLE, batch_size=self.batch_size, optional=True)]

    @hookimpl
    def advantages(self, rollouts: Rollouts, rewards: Rewards, advantages: Tensor) -> Tensor:
        """The advantages of this rank's completions, weighted; evaluation stays as it is."""
        if not rollouts.training:
            return advantages
        # Every rank counts the completions of all: which prompts the others had, only they know.
        mine = [prompt_number(prompt_key(row["prompt"])) for row in rollouts.inputs]
        numbers = gather(torch.tensor(mine, device=rollouts.mask.device)).tolist()
        missing = [number for number in numbers if number not in self._prompts.index]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(numbers)} completions have prompts that the probe in {self.probe} did not "
                "see; probe the training set of this run"
            )
        rows = np.array([self._prompts.index[number] for number in numbers])
        if self.reroute_every and rollouts.step - self._rerouted >= self.reroute_every:
            budget = Budget(rollouts.num_generations, self._prompts.settings["epochs"])
            self._prompts.reroute(budget, self.confidence)
            self._rerouted = rollouts.step
        weights = torch.tensor([getattr(self, self._prompts.routes[row]) for row in rows], dtype=advantages.dtype)
        self._prompts.add(rows, (rewards.total >= self.success).cpu().numpy())
        scaled = (weights / weights.mean().clamp(min=torch.finfo(weights.dtype).tiny))[rewards.local]
        scaled = scaled.to(advantages.device)
        return advantages * (scaled if advantages.dim() == 1 else scaled.unsqueeze(1))

    @hookimpl
    def gradients_ready(self, gradients: GradientView, streams: Mapping[str, StreamGradient]) -> None:
        """Add the gradient of the demonstrations."""
        if ROLE in streams:
            gradients.axpy_(self.coefficient, streams[ROLE].gradients)

    @hookimpl
    def metrics(self, mode: str) -> dict[str, float]:
        """Predicted and observed solved share so far, and how many of all prompts have each route."""
        if mode != "train":
            return {}
        routes = self._prompts.routes
        return self._prompts.outcome() | {route: routes.count(route) / len(routes) for route in ROUTES}

    def state_dict(self) -> dict[str, Any]:
        """Counts and routes, in the probe's order."""
        prompts = self._prompts
        return {
            "draws": torch.from_numpy(prompts.draws.copy()),
            "successes": torch.from_numpy(prompts.successes.copy()),
            "recent": torch.from_numpy(prompts.recent.copy()),
            "routes": torch.tensor([ROUTES.index(route) for route in prompts.routes]),
            "rerouted": self._rerouted,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back.

        Raises:
            ValueError: they are of another probe.
        """
        prompts = self._prompts
        if len(state["draws"]) != len(prompts.draws):
            raise ValueError(
                f"the checkpoint counts {len(state['draws'])} prompts, the probe in {self.probe} has "
                f"{len(prompts.draws)}; give the probe of the run that is continued"
            )
        prompts.draws[:] = state["draws"].numpy()
        prompts.successes[:] = state["successes"].numpy()
        prompts.recent[:] = state["recent"].numpy()
        prompts.routes[:] = [ROUTES[i] for i in state["routes"].tolist()]
        self._rerouted = state["rerouted"]
