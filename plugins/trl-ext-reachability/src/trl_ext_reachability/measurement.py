"""The measurement: demonstrations first, then rounds of rollouts for the prompts whose route is still open."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from trl_ext.data import refuse_missing_columns
from trl_ext_reachability.dotted import load_function
from trl_ext_reachability.journal import Journal
from trl_ext_reachability.keys import prompt_key
from trl_ext_reachability.measurement_settings import MeasurementSettings
from trl_ext_reachability.reward_calls import judge, refuse_unjudged
from trl_ext_reachability.routing import choose_route, undecided
from trl_ext_reachability.sampled_policy import Policy, Sampler, batches
from trl_ext_reachability.statistics import BetaPrior, clopper_pearson, expected_queries, fit_prior

WORST_SHARES = (0.0, 0.01, 0.05)
"""Quantiles of a demonstration's token probabilities that are kept; the first is the least."""


class Measurement:
    """Counts of rollouts and successes, and scores of demonstrations, per prompt.

    Args:
        settings: what to measure.
        rows: the data set, with `prompt`, the columns of the reward function and optionally `completion`.
    """

    def __init__(self, settings: MeasurementSettings, rows: Sequence[dict[str, Any]]) -> None:
        if not rows:
            raise ValueError(f"{settings.dataset} has no rows")
        if "prompt" not in rows[0]:
            raise ValueError(
                f"{settings.dataset} has no column 'prompt' but {', '.join(rows[0])}; name it by --columns"
            )
        self.settings = settings
        self.rows = rows
        self.drawn = np.zeros(len(rows), dtype=int)
        """(rows,) rollouts, judged or not."""
        self.trials = np.zeros(len(rows), dtype=int)
        """(rows,) rollouts that the reward function judged; what it gave None for is neither success nor failure."""
        self.successes = np.zeros(len(rows), dtype=int)
        self.log_likelihoods = np.full(len(rows), -np.inf)
        """(rows,) of the demonstrations; -inf without one."""
        self.worst = np.full((len(rows), len(WORST_SHARES)), np.nan)
        """(rows, 3) probabilities of the demonstrations' worst tokens; NaN without one."""
        self.correct = np.zeros(len(rows), dtype=bool)
        """(rows,) whether the reward function accepts the demonstration."""

        self.demonstrated = np.array([bool(row.get("completion")) for row in rows])
        """(rows,) whether there is a demonstration that the sampler can draw."""
        self.too_long = np.zeros(len(rows), dtype=bool)
        """(rows,) whether the demonstration has more tokens than a completion, and so is not used."""

    def run(self, journal: Journal, make_policy: Callable[[], Policy] | None = None) -> Iterator[tuple[str, int, int]]:
        """Do what the journal does not have yet.

        Yields:
            What is being done, how many batches of it are done, and how many there are.

        Raises:
            ValueError: the reward function gives what is no reward, or judges no rollout of a prompt.
        """
        settings = self.settings
        done = iter(list(journal.lines))
        policy: Policy | None = None
        reward = load_function(settings.reward)
        refuse_missing_columns(reward, self.rows[0], settings.reward)
        for name, parts, work in self._parts():
            for i, batch in enumerate(parts):
                line = next(done, None)
                if line is None:
                    if policy is None:
                        sampler = Sampler(
                            settings.max_completion_length, settings.temperature, settings.top_p, settings.top_k
                        )
                        policy = make_policy() if make_policy else Policy(settings.model, sampler, settings.dtype)
                    line = {"part": name, "batch": i, **work(policy, reward, name, i, batch)}
                    journal.append(line)
                self._take(line)
                yield name, i + 1, len(parts)

    def _parts(self) -> Iterator[tuple[str, list[list[int]], Callable[..., dict[str, Any]]]]:
        """What to do, in order; the rounds depend on the results before."""
        size = self.settings.batch_size
        yield "demonstrations", batches(self.rows, np.flatnonzero(self.demonstrated).tolist(), size), self._score
        for i, total in enumerate(self.settings.totals):
            # A demonstration alone may close a route, but every prompt has a first round.
            wanted = np.maximum(total - self.drawn, 0) * (self.open | (self.drawn == 0))
            prompts = [row for row in range(len(self.rows)) for _ in range(wanted[row])]
            yield f"rollouts, round {i + 1}", batches(self.rows, prompts, size), self._draw
            refuse_unjudged(np.flatnonzero(self.trials == 0).tolist(), self.settings.reward, self.settings.dataset)

    @property
    def open(self) -> np.ndarray:
        """(rows,) bool: whether more rollouts could change the route."""
        low, high = self.bounds()
        return np.array([undecided(a, b, self.settings.budget) for a, b in zip(low, high, strict=True)])

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """(rows,) bounds of the success rates, from rollouts and from the likelihood of correct demonstrations."""
        settings = self.settings
        low, high = clopper_pearson(self.successes, self.trials, settings.confidence_per_look)
        if Sampler(top_p=settings.top_p, top_k=settings.top_k).plain:
            low = np.where(self.correct, np.maximum(low, np.exp(self.log_likelihoods)), low)
        return low, np.maximum(high, low)

    @property
    def prior(self) -> BetaPrior:
        """The distribution of success rates over prompts that fits the rollouts best."""
        return fit_prior(self.successes, self.trials)

    def prompts(self) -> list[dict[str, Any]]:
        """One record per prompt, in the order of the data set."""
        settings, budget = self.settings, self.settings.budget
        low, high = self.bounds()
        p = self.successes / np.maximum(self.trials, 1)
        prior = self.prior
        at_least_one = prior.reached(self.successes, self.trials, budget.draws)
        informative = prior.informative_group(self.successes, self.trials, settings.num_generations)
        records = []
        for i, row in enumerate(self.rows):
            worst = self.worst[i].tolist() if self.demonstrated[i] else None
            # What the reward function refuses shows no way to a success.
            worst_step = worst[0] if worst and self.correct[i] else None
            queries = float(expected_queries(p[i]))
            records.append(
                {
                    "row": i,
                    "key": prompt_key(row["prompt"]),
                    "rollouts": int(self.trials[i]),
                    "successes": int(self.successes[i]),
                    "low": float(low[i]),
                    "high": float(high[i]),
                    "at_least_one": float(at_least_one[i]),
                    "informative_group": float(informative[i]),
                    "expected_queries": None if math.isinf(queries) else queries,
                    "demonstration_correct": bool(self.correct[i]) if worst else None,
                    "log_likelihood": float(self.log_likelihoods[i]) if worst else None,
                    "worst_steps": worst,
                    "route": choose_route(p[i], low[i], high[i], budget, worst_step),
                }
            )
        return records

    def _score(self, policy: Policy, reward: Any, name: str, index: int, batch: list[int]) -> dict[str, Any]:
        prompts = [policy.prompt_ids(self.rows[i]["prompt"]) for i in batch]
        answers = [policy.demonstration_ids(self.rows[i]["prompt"], self.rows[i]["completion"]) for i in batch]
        log_probs = [found.numpy() for found in policy.log_probs(prompts, answers)]
        return {
            "rows": batch,
            "log_likelihoods": [float(values.sum()) for values in log_probs],
            "too_long": [len(ids) > self.settings.max_completion_length for ids in answers],
            "worst": [np.exp(np.quantile(values, WORST_SHARES, method="lower")).tolist() for values in log_probs],
            "correct": [bool(correct) for correct in self._judge(policy, reward, batch, answers)],
        }

    def _draw(self, policy: Policy, reward: Any, name: str, index: int, batch: list[int]) -> dict[str, Any]:
        digest = hashlib.sha256(f"{self.settings.seed} {name} {index}".encode()).digest()
        drawn = policy.sample(
            [policy.prompt_ids(self.rows[i]["prompt"]) for i in batch], int.from_bytes(digest[:6], "big")
        )
        return {"rows": batch, "correct": self._judge(policy, reward, batch, drawn)}

    def _judge(self, policy: Policy, reward: Any, batch: list[int], completions: list[list[int]]) -> list[bool | None]:
        """Whether each completion is a success; None where the reward function gives None."""
        texts = [policy.text(ids) for ids in completions]
        rewards = judge(reward, self.settings.reward, [self.rows[i] for i in batch], texts, completions)
        return [None if value is None else value >= self.settings.success for value in rewards]

    def _take(self, line: dict[str, Any]) -> None:
        rows = line["rows"]
        if line["part"] == "demonstrations":
            self.log_likelihoods[rows] = line["log_likelihoods"]
            self.worst[rows] = line["worst"]
            self.too_long[rows] = line["too_long"]
            self.demonstrated[rows] = ~self.too_long[rows]
            self.correct[rows] = line["correct"] & self.demonstrated[rows]
        else:
            np.add.at(self.drawn, rows, 1)
            np.add.at(self.trials, rows, [correct is not None for correct in line["correct"]])
            np.add.at(self.successes, rows, [correct is True for correct in line["correct"]])


def load_rows(settings: MeasurementSettings) -> list[dict[str, Any]]:
    """The data set in memory; raises `ConfigurationError` where it cannot be loaded."""
    from trl_ext.data import load_dataset_spec, parse_columns

    rows = load_dataset_spec(
        {
            "path": settings.dataset,
            "name": settings.dataset_name,
            "split": settings.split,
            "columns": parse_columns(settings.columns, "--columns"),
        }
    )
    return list(rows if settings.limit is None else rows.take(min(settings.limit, len(rows))))
