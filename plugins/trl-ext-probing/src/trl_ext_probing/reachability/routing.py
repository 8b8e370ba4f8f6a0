"""Which kind of training a prompt is ready for, by how often the base model solves it."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import Literal, get_args

from trl_ext.errors import ConfigurationError

Route = Literal["saturated", "in_reach", "marginal", "process_reward", "demonstration", "out_of_reach"]
ROUTES: tuple[Route, ...] = get_args(Route)
HOPELESS: tuple[Route, ...] = ("process_reward", "demonstration", "out_of_reach")
"""Routes of prompts whose success is not to be expected within the budget."""

ADVICE: dict[Route, str] = {
    "saturated": "almost every group is all correct: down-weight or drop",
    "in_reach": "outcome reward",
    "marginal": "more generations per group, or later in a curriculum",
    "process_reward": "a success is not to be expected, but each step of the demonstration is: process reward or hints",
    "demonstration": "some step is out of reach too: SFT on the demonstration, or drop",
    "out_of_reach": "a success is not to be expected, and there is no demonstration: find one, or drop",
}

IN_REACH = 3.0
"""Expected successes within the budget: P(at least one) is 95 % or more."""
OUT_OF_REACH = 1.0
"""Expected successes within the budget: below it the first success takes more than the budget on average."""


@dataclass(frozen=True)
class Budget:
    """What GRPO will draw for each prompt."""

    num_generations: int
    epochs: float = 1.0

    def __post_init__(self) -> None:
        if self.num_generations < 2:
            raise ConfigurationError(f"--num-generations {self.num_generations}: a group has at least 2 completions")
        if not (math.isfinite(self.epochs) and self.epochs > 0):
            raise ConfigurationError(f"--epochs {self.epochs:g}: above 0")

    @property
    def draws(self) -> int:
        """Completions of a prompt over the whole training."""
        return max(1, round(self.num_generations * self.epochs))

    @property
    def cuts(self) -> tuple[float, float, float]:
        """Success rates between out of reach, marginal, in reach and saturated."""
        return OUT_OF_REACH / self.draws, IN_REACH / self.draws, 1 - 1 / self.num_generations


def choose_route(p: float, low: float, high: float, budget: Budget, worst_step: float | None = None) -> Route:
    """The route of one prompt.

    Args:
        p: estimated success rate.
        low, high: bounds of it; `low` may come from the likelihood of a correct demonstration.
        budget: what GRPO will draw.
        worst_step: least probability of a token of the demonstration, given those before; None without one.
    """
    out, reach, saturated = budget.cuts
    if p > saturated:
        return "saturated"
    if low >= reach:
        return "in_reach"
    if high >= out:
        return "marginal"
    if worst_step is None:
        return "out_of_reach"
    # With a process reward the right token has to be drawn once after a right prefix, so the budget is the same.
    return "process_reward" if worst_step >= out else "demonstration"


def undecided(low: float, high: float, budget: Budget) -> bool:
    """Whether the bounds leave room for more than one route."""
    return any(low < cut <= high for cut in budget.cuts)


def schedule(first: int, limit: int) -> list[int]:
    """Rollouts of a prompt after each round: doubled from round to round, up to the limit."""
    if not 1 <= first <= limit:
        raise ConfigurationError(f"--n {first}, --max-rollouts {limit}: at least 1, and no more than the limit")
    totals = [first]
    while totals[-1] < limit:
        totals.append(min(2 * totals[-1], limit))
    return totals


def failures_close(n: int, looks: int, budget: Budget, confidence: float) -> bool:
    """Whether n failures and no success, seen at the last of several looks, leave one route only."""
    from trl_ext_probing.intervals import clopper_pearson  # with scipy, which the settings' help does without

    low, high = clopper_pearson(0, n, confidence_per_look(confidence, looks))
    return not undecided(float(low), float(high), budget)


def closing_limit(first: int, budget: Budget, confidence: float) -> int:
    """The smallest limit of `schedule` at which a prompt without a success is out of reach for sure.

    A larger limit takes more rounds, and with them more confidence at each, so that it is found round by round.

    Args:
        first: rollouts of the first round.
        budget: what GRPO will draw.
        confidence: of the bounds over all rounds.

    Raises:
        ConfigurationError: the first round is empty.
    """
    if first < 1:
        raise ConfigurationError(f"--n {first}: at least 1")
    end, looks = first, 1
    while not failures_close(end, looks, budget, confidence):
        end, looks = 2 * end, looks + 1
    start = first if looks == 1 else end // 2 + 1
    return bisect_left(range(end), True, lo=start, key=lambda n: failures_close(n, looks, budget, confidence))


def confidence_per_look(confidence: float, looks: int) -> float:
    """Confidence to use at each of several looks, so that all bounds hold together with the given one (Bonferroni).

    Rollouts stop when the bounds say so, and bounds at a chosen moment cover less often than their nominal rate.
    """
    return 1 - (1 - confidence) / looks
