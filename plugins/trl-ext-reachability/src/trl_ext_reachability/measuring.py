"""The measurement: demonstrations first, then rounds of rollouts for the prompts whose route is still open."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trl_ext.data import refuse_missing_columns
from trl_ext.errors import ConfigurationError
from trl_ext_reachability.digests import digest_files
from trl_ext_reachability.dotted import load_function
from trl_ext_reachability.journal import Journal
from trl_ext_reachability.judging import judge
from trl_ext_reachability.keys import prompt_key
from trl_ext_reachability.policy import Policy, Sampler, batches
from trl_ext_reachability.routing import (
    Budget,
    choose_route,
    closing_limit,
    confidence_per_look,
    failures_close,
    schedule,
    undecided,
)
from trl_ext_reachability.statistics import BetaPrior, clopper_pearson, expected_queries, fit_prior

WORST_SHARES = (0.0, 0.01, 0.05)
"""Quantiles of a demonstration's token probabilities that are kept; the first is the least."""


@dataclass(frozen=True)
class Settings:
    """Everything that the measurement depends on; `max_rollouts` is `closing_rollouts` where it is None."""

    model: str
    dataset: str
    reward: str
    dataset_name: str | None = None
    split: str = "train"
    columns: str | None = None
    limit: int | None = None
    success: float = 1.0
    num_generations: int = 8
    epochs: float = 1.0
    rollouts: int = 8
    max_rollouts: int | None = None
    confidence: float = 0.95
    max_completion_length: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int = 64
    seed: int = 0
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence={self.confidence}: between 0 and 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: above 0, since greedy completions have no success rate")
        _ = self.budget, self.totals  # refuse what they refuse

    @property
    def budget(self) -> Budget:
        """What GRPO will draw."""
        return Budget(self.num_generations, self.epochs)

    @property
    def totals(self) -> list[int]:
        """Rollouts of a prompt after each round."""
        return schedule(self.rollouts, self.closing_rollouts if self.max_rollouts is None else self.max_rollouts)

    @property
    def closing_rollouts(self) -> int:
        """The smallest limit at which failures alone show that a prompt is out of reach."""
        return closing_limit(self.rollouts, self.budget, self.confidence)

    @property
    def closes(self) -> bool:
        """Whether the limit of rollouts is enough for that."""
        return failures_close(self.totals[-1], len(self.totals), self.budget, self.confidence)

    @property
    def confidence_per_look(self) -> float:
        """Confidence of the bounds after each round."""
        return confidence_per_look(self.confidence, len(self.totals))

    def as_dict(self) -> dict[str, Any]:
        """By name, with the limit of rollouts as a number."""
        return {**asdict(self), "max_rollouts": self.totals[-1]}


class Measurement:
    """Counts of rollouts and successes, and scores of demonstrations, per prompt.

    Args:
        settings: what to measure.
        rows: the data set, with `prompt`, the columns of the reward function and optionally `completion`.
    """

    def __init__(self, settings: Settings, rows: Sequence[dict[str, Any]]) -> None:
        if not rows:
            raise ValueError(f"{settings.dataset} has no rows")
        if "prompt" not in rows[0]:
            raise ValueError(
                f"{settings.dataset} has no column 'prompt' but {', '.join(rows[0])}; name it by --columns"
            )
        self.settings = settings
        self.rows = rows
        self.trials = np.zeros(len(rows), dtype=int)
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
            wanted = np.maximum(total - self.trials, 0) * (self.open | (self.trials == 0))
            prompts = [row for row in range(len(self.rows)) for _ in range(wanted[row])]
            yield f"rollouts, round {i + 1}", batches(self.rows, prompts, size), self._draw

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
            "correct": self._judge(policy, reward, batch, answers),
        }

    def _draw(self, policy: Policy, reward: Any, name: str, index: int, batch: list[int]) -> dict[str, Any]:
        digest = hashlib.sha256(f"{self.settings.seed} {name} {index}".encode()).digest()
        drawn = policy.sample(
            [policy.prompt_ids(self.rows[i]["prompt"]) for i in batch], int.from_bytes(digest[:6], "big")
        )
        return {"rows": batch, "correct": self._judge(policy, reward, batch, drawn)}

    def _judge(self, policy: Policy, reward: Any, batch: list[int], completions: list[list[int]]) -> list[bool]:
        texts = [policy.text(ids) for ids in completions]
        rewards = judge(reward, self.settings.reward, [self.rows[i] for i in batch], texts, completions)
        return [value is not None and value >= self.settings.success for value in rewards]

    def _take(self, line: dict[str, Any]) -> None:
        rows = line["rows"]
        if line["part"] == "demonstrations":
            self.log_likelihoods[rows] = line["log_likelihoods"]
            self.worst[rows] = line["worst"]
            self.too_long[rows] = line["too_long"]
            self.demonstrated[rows] = ~self.too_long[rows]
            self.correct[rows] = line["correct"] & self.demonstrated[rows]
        else:
            np.add.at(self.trials, rows, 1)
            np.add.at(self.successes, rows, np.array(line["correct"], dtype=int))


def load_rows(settings: Settings) -> list[dict[str, Any]]:
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


def measure(settings: Settings, output: Path) -> Generator[tuple[str, int, int], None, None]:
    """Measure, and write the results after the last batch; see `Measurement.run` for what it yields.

    Args:
        settings: what to measure.
        output: folder of the results, and of `journal.jsonl`, which an interrupted run continues from.

    Raises:
        ConfigurationError: this is one of several processes, or the journal is of another measurement.
    """
    from trl_ext_reachability.results import write_results

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigurationError("probe reachability runs in one process; start it without a launcher")
    measurement = Measurement(settings, load_rows(settings))
    keys = "".join(prompt_key(row) for row in measurement.rows)
    about = {
        **settings.as_dict(),
        "the model's files": digest_files(Path(settings.model)),
        "data": hashlib.sha256(keys.encode()).hexdigest(),
    }
    with Journal(output / "journal.jsonl", about) as journal:
        yield from measurement.run(journal)
    write_results(measurement, output)
