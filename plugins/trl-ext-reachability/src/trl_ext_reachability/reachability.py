"""`reachability`: GRPO whose prompts weigh what a probe of the base model says of them.

By arXiv 2603.06957 outcome rewards reach a prompt in about 1/alpha queries, where alpha is the base model's likelihood
of a success. `trl-ext probe reachability` measures alpha and gives each prompt a route (see the module
`trl_ext_probing.reachability.routing`). With the weight w of each route, the advantage of completion i of N becomes

    A_i <- w(route_i) / (1/N sum_j w(route_j)) A_i,

and where demonstrations are given, their gradient is added: g <- g + coefficient * grad NLL(demonstrations).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import torch
from accelerate.utils import gather
from torch import Tensor
from trl_ext_probing.reachability.keys import prompt_key, prompt_number
from trl_ext_probing.reachability.routing import ROUTES, Budget

from trl_ext import hookimpl
from trl_ext.gradients import GradientView
from trl_ext.groups import group_advantages, judged_total
from trl_ext.options import Range
from trl_ext.ranks import on_every_rank
from trl_ext.records import Rewards, Rollouts, RunDescription, StreamGradient, StreamRequest
from trl_ext_reachability.draw_order import Order, draw_order
from trl_ext_reachability.merged_groups import group_labels
from trl_ext_reachability.probe_agreement import refuse_other_sampling
from trl_ext_reachability.prompts import Prompts
from trl_ext_reachability.relations import AFTER, NEW_ADVANTAGES, declare

if TYPE_CHECKING:
    import datasets

ROLE = "demonstrations"
Weight = Annotated[float, Range(ge=0)]


@dataclass(eq=False)
class Reachability:
    """Weighs the advantages of each prompt by its route, and learns from demonstrations where rollouts cannot teach.

    Weights are divided by their mean over the completions of all ranks, so that the size of the update stays: a
    prompt of weight 0 hands its share to the others, although its tokens remain in TRL's denominator. With `filter` it
    is not drawn at all. Plugins that set advantages anew are named before this one.

    Args:
        probe: Folder that `trl-ext probe reachability` wrote, for the prompts of this run and its group size.
        saturated, in_reach, marginal, process_reward, demonstration, out_of_reach: Weight of the advantages of
            prompts with that route.
        order: "data" draws prompts in the order of the trainer, "easy-first" and "hard-first" by the success rate that
            the probe found.
        filter: Whether prompts of weight 0 are not drawn; others are drawn more often in their place. A prompt that is
            not drawn keeps its route.
        marginal_groups: Groups of a marginal prompt, side by side in a generation batch, with advantages as of one
            large group; not after plugins that set advantages anew. An epoch has as many groups as without, so it
            leaves out other prompts: those that the trainer's order has last.
        reroute_every: Optimiser steps after which routes follow what training itself drew since the last time, but for
            prompts without hope, which keep theirs until they are solved once; 0 for the probe's routes throughout.
        confidence: Of the bounds that routes are chosen by then.
        success: Reward from which a completion counts as correct; the probe's where None.
        coefficient: Of the gradient of the optional stream "demonstrations" (SFT), which is added.
        batch_size: Its samples per rank and step.
    """

    requires_api: ClassVar[str] = ">=1.1,<2"  # 1.1: prompt_order
    trainers: ClassVar[tuple[str, ...]] = ("grpo",)
    state_version: ClassVar[int] = 1
    citation: ClassVar[str] = (
        "Post-training with policy gradients: optimality and the base model barrier, arXiv 2603.06957"
    )
    cost: ClassVar[str] = "the probe, once; with the stream a batch of demonstrations a step"
    after: ClassVar[Mapping[str, str]] = AFTER

    probe: str
    saturated: Weight = 0.5
    in_reach: Weight = 1.0
    marginal: Weight = 1.0
    process_reward: Weight = 1.0
    demonstration: Weight = 0.0
    out_of_reach: Weight = 0.0
    order: Order = "data"
    filter: bool = False
    marginal_groups: Annotated[int, Range(ge=1)] = 1
    reroute_every: Annotated[int, Range(ge=0)] = 0
    confidence: Annotated[float, Range(gt=0, lt=1)] = 0.95
    success: float | None = None
    coefficient: Weight = 0.1
    batch_size: Annotated[int, Range(ge=1)] = 8

    def __post_init__(self) -> None:
        if not any(getattr(self, route) for route in ROUTES):
            raise ValueError(f"{', '.join(ROUTES)} are all 0: nothing would be learned from rollouts")
        self._prompts = Prompts(Path(self.probe).expanduser())
        if self.marginal_groups > 1:
            reason = (
                f"marginal_groups={self.marginal_groups} needs the trainer's own advantages, which a plugin replaces "
                "that sets them anew; set marginal_groups=1."
            )
            declare(self, conflicts={NEW_ADVANTAGES: reason})
        self._rerouted = 0
        self._batch_groups = 1
        self._scale_rewards = "group"
        if self.order != "data" or self.filter or self.marginal_groups > 1:
            # An attribute only where there is something to order: the hook rules out streaming data sets.
            @hookimpl
            def prompt_order(order: list[int], prompts: datasets.Dataset) -> list[int]:
                return self._ordered(order, prompts)

            self.prompt_order = prompt_order

    @hookimpl
    def check(self, run: RunDescription) -> None:
        """Refuse other sampling than the probe's, and groups that cannot be made larger."""
        refuse_other_sampling(self._prompts.settings, self.probe, run.args)
        self._batch_groups = run.args.generation_batch_size // run.args.num_generations
        self._scale_rewards = run.args.scale_rewards
        if self.marginal_groups > self._batch_groups:
            raise ValueError(
                f"marginal_groups={self.marginal_groups}: a generation batch has {self._batch_groups} groups; "
                "lower it, or raise steps_per_generation"
            )
        if self.marginal_groups > 1 and run.args.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"marginal_groups={self.marginal_groups} normalises the sum of the rewards; set "
                "multi_objective_aggregation='sum_then_normalize', or marginal_groups=1"
            )

    @hookimpl
    def setup(self) -> None:
        """Start each training from the probe's routes, without counts."""
        self._prompts, self._rerouted = Prompts(Path(self.probe).expanduser()), 0

    @hookimpl
    def streams(self) -> list[StreamRequest]:
        """Demonstrations, where they are given: the probe writes `demonstrations.jsonl`."""
        return [StreamRequest(ROLE, batch_size=self.batch_size, optional=True)]

    def _ordered(self, order: list[int], prompts: datasets.Dataset) -> list[int]:
        """Sorted, filtered, and with several groups for marginal prompts."""
        places = self._prompts.places(prompt_number(prompt_key(prompt)) for prompt in prompts["prompt"])
        routes = [self._prompts.routes[place] for place in places]
        kept = [not self.filter or getattr(self, route) > 0 for route in routes]
        if not any(kept):
            raise ValueError("filter=True leaves no prompt: give a weight to one of their routes")
        groups = [self.marginal_groups if route == "marginal" else 1 for route in routes]
        return draw_order(order, kept, groups, self._prompts.rates[places].tolist(), self.order, self._batch_groups)

    @hookimpl
    def advantages(self, rollouts: Rollouts, rewards: Rewards, advantages: Tensor) -> Tensor:
        """(N,) float or (N, T) float, as they come: w A / mean w over all ranks; evaluation stays as it is."""
        if not rollouts.training:
            return advantages
        rows = self._rows(rollouts)
        if self.reroute_every and rollouts.step - self._rerouted >= self.reroute_every:
            budget = Budget(rollouts.num_generations, self._prompts.settings["epochs"])
            self._prompts.reroute(budget, self.confidence)
            self._rerouted = rollouts.step
        if self.marginal_groups > 1:
            advantages = self._merged(rows, rollouts, rewards, advantages)
        weights = torch.tensor([getattr(self, self._prompts.routes[row]) for row in rows], dtype=advantages.dtype)
        self._count(rows, rewards)
        scaled = (weights / weights.mean().clamp(min=torch.finfo(weights.dtype).tiny))[rewards.local]
        scaled = scaled.to(advantages.device)
        return advantages * (scaled if advantages.dim() == 1 else scaled.unsqueeze(1))

    def _rows(self, rollouts: Rollouts) -> np.ndarray:
        """(N x ranks,) the probe's place of each completion's prompt. Collective.

        Every rank counts the completions of all: which prompts the others had, only they know.
        """
        mine = on_every_rank(lambda: [prompt_number(prompt_key(row["prompt"])) for row in rollouts.inputs])
        numbers = gather(torch.tensor(mine, device=rollouts.mask.device)).tolist()
        return np.array(self._prompts.places(numbers))

    def _count(self, rows: np.ndarray, rewards: Rewards) -> None:
        """Count the completions that a reward function judged, and those of them that are correct."""
        success = self._prompts.settings["solved_at"] if self.success is None else self.success
        total = judged_total(rewards).cpu().numpy()
        judged = ~np.isnan(total)
        self._prompts.add(rows[judged], total[judged] >= success)

    def _merged(self, rows: np.ndarray, rollouts: Rollouts, rewards: Rewards, advantages: Tensor) -> Tensor:
        """The advantages with all groups of a marginal prompt as one."""
        total = judged_total(rewards)
        marginal = [self._prompts.routes[row] == "marginal" for row in rows]
        none = [False] * len(rows)
        apart, merged = (
            group_advantages(total, labels.to(total.device), self._scale_rewards)[rewards.local].to(advantages)
            for labels in (group_labels(rows.tolist(), which, rollouts.num_generations) for which in (none, marginal))
        )
        if advantages.dim() != 1 or not torch.allclose(advantages, apart, rtol=1e-3, atol=1e-3):
            raise ValueError(
                f"marginal_groups={self.marginal_groups} needs the trainer's own advantages, which a plugin before "
                "this one has changed; set marginal_groups=1, or leave that plugin out (pg: rewards='given')"
            )
        return merged

    @hookimpl
    def gradients_ready(self, gradients: GradientView, streams: Mapping[str, StreamGradient]) -> None:
        """Add the gradient of the demonstrations: of their mean NLL per label token over all ranks."""
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
        return {**self._prompts.state_dict(), "rerouted": self._rerouted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back; raises `ValueError` where they are of another probe."""
        self._prompts.load_state_dict(state)
        self._rerouted = state["rerouted"]
