"""The measurement: demonstrations first, then rounds of rollouts for the prompts whose route is still open."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trl_ext_probing.encoding import Encoded, drawn_ids, prompt_ids
from trl_ext_probing.engines.prompt_tokens import end_tokens
from trl_ext_probing.intervals import Floats, clopper_pearson
from trl_ext_probing.journal import Journal
from trl_ext_probing.progress import Report
from trl_ext_probing.ranks import batched, from_first, world_size
from trl_ext_probing.reachability.keys import prompt_key
from trl_ext_probing.reachability.reach_settings import ReachabilitySettings
from trl_ext_probing.reachability.routing import choose_route, undecided
from trl_ext_probing.reachability.statistics import BetaPrior, fit_prior
from trl_ext_probing.rewards import Judge, refuse_unjudged
from trl_ext_probing.sampling import SampledModel, Samples
from trl_ext_probing.scoring import Scorer, TokenScores


class Measurement:
    """Counts of rollouts and successes, and scores of demonstrations, per prompt, under one model.

    Args:
        settings: What to measure.
        rows: The data set, with `prompt`, the columns of the reward functions and optionally `completion`.
        model: Its name.
        journal: What is done, and where the rest goes.
    """

    def __init__(
        self, settings: ReachabilitySettings, rows: Sequence[dict[str, Any]], model: str, journal: Journal
    ) -> None:
        self.settings, self.rows, self.model = settings, rows, model
        self.journal = journal
        self.samples = Samples(rows, journal)
        self.demonstrations: dict[int, dict[str, Any]] = {}
        """By row: `log_likelihood`, `worst_token` and so on, `too_long`, and whether it is `correct`."""
        for line in journal.lines:
            if "demonstration" in line:
                self.demonstrations[line["demonstration"]] = line

    def run(self, model: SampledModel, judge: Judge, report: Report) -> None:
        """Do what the journal does not have yet.

        Raises:
            ConfigurationError: A reward function gives what is no reward, or judges no rollout of a prompt.
        """
        shown = [i for i, row in enumerate(self.rows) if row.get("completion") and i not in self.demonstrations]
        if shown and self.settings.engine != "server":  # whose model cannot be asked for the probability of a text
            self._score(shown, model, judge, report)
        still_open = np.ones(len(self.rows), dtype=bool)
        before = 0
        for number, total in enumerate(self.settings.totals, start=1):
            if before:  # a demonstration alone may close a route, but every prompt has a first round
                still_open &= self.open(before)
            draws = [(i, j) for i in np.flatnonzero(still_open).tolist() for j in range(before, total)]
            progress = self.samples.draw(draws, model.engine, judge, self.settings)
            report.follow(f"{self.model}: rollouts, round {number}", len(draws), progress)
            _, trials, _ = self.counts(total)
            refuse_unjudged(np.flatnonzero(trials == 0).tolist(), judge.name, self.settings.dataset)
            before = total

    def counts(self, total: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """(rows,) rollouts, judged or not; those that were judged; successes. Of the first `total` rollouts, or all.

        What no reward function applies to is neither success nor failure.
        """
        rewards = [of_row[:total] for of_row in self.samples.rewards()]
        judged = [[reward for reward in row if reward is not None] for row in rewards]
        successes = [sum(reward >= self.settings.solved_at for reward in row) for row in judged]
        return np.array(list(map(len, rewards))), np.array(list(map(len, judged))), np.array(successes)

    def open(self, total: int) -> NDArray[np.bool_]:
        """(rows,) whether more than the first `total` rollouts could change the route."""
        low, high = self.bounds(total)
        return np.array([undecided(a, b, self.settings.budget) for a, b in zip(low, high, strict=True)])

    def bounds(self, total: int | None = None) -> tuple[Floats, Floats]:
        """(rows,) bounds of the success rates, from rollouts and from the likelihood of correct demonstrations."""
        _, trials, successes = self.counts(total)
        low, high = clopper_pearson(successes, trials, self.settings.confidence_per_look)
        if self.settings.plain:
            for i, line in self.demonstrations.items():
                if line["correct"] and not line["too_long"]:
                    low[i] = max(low[i], math.exp(line["log_likelihood"]))
        return low, np.maximum(high, low)

    @property
    def prior(self) -> BetaPrior:
        """The distribution of success rates over prompts that fits the rollouts best."""
        _, trials, successes = self.counts()
        return fit_prior(successes, trials)

    def prompts(self) -> list[dict[str, Any]]:
        """One record per prompt, in the order of the data set."""
        settings, budget = self.settings, self.settings.budget
        low, high = self.bounds()
        _, trials, successes = self.counts()
        _, first_trials, first_successes = self.counts(settings.n)
        prior = self.prior
        at_least_one = prior.reached(successes, trials, budget.draws)
        informative = prior.informative_group(successes, trials, settings.num_generations)
        records = []
        for i, row in enumerate(self.rows):
            p = float(successes[i] / trials[i])
            shown = self.demonstrations.get(i)
            shown = None if shown is None or shown["too_long"] else shown
            # What the reward function refuses shows no way to a success.
            worst = shown["worst_token"] if shown and shown["correct"] else None
            records.append(
                {
                    "model": self.model,
                    "row": i,
                    "key": prompt_key(row["prompt"]),
                    "rollouts": int(trials[i]),
                    "successes": int(successes[i]),
                    "first_rollouts": int(first_trials[i]),
                    "first_successes": int(first_successes[i]),
                    "low": float(low[i]),
                    "high": float(high[i]),
                    "at_least_one": float(at_least_one[i]),
                    "informative_group": float(informative[i]),
                    "expected_queries": 1 / p if p else None,
                    "demonstration_correct": shown["correct"] if shown else None,
                    "log_likelihood": shown["log_likelihood"] if shown else None,
                    "worst_token": shown["worst_token"] if shown else None,
                    "route": choose_route(p, float(low[i]), float(high[i]), budget, worst),
                }
            )
        return records

    def _score(self, places: list[int], model: SampledModel, judge: Judge, report: Report) -> None:
        """Score and judge demonstrations as completions that the model would have to draw."""
        loaded, tokenizer = model.loaded
        scorer, ends = Scorer(loaded, self.settings.temperature), end_tokens(loaded, tokenizer)
        report.start(f"{self.model}: demonstrations", len(places))
        done = 0
        for batch in batched(places, self.settings.batch_size * world_size()):
            rows = [self.rows[i] for i in batch]
            heads = [prompt_ids(tokenizer, row["prompt"]) for row in rows]
            answers = [drawn_ids(tokenizer, row["prompt"], row["completion"], ends) for row in rows]
            examples = [Encoded(head + answer, len(head)) for head, answer in zip(heads, answers, strict=True)]
            texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
            scores = scorer.score_shared(examples)
            rewards = from_first(partial(judge, rows, texts, answers, batch))
            lines = list(map(self._demonstration, batch, answers, scores, rewards))
            self.journal.append(*lines)
            self.demonstrations |= {line["demonstration"]: line for line in lines}
            done += len(batch)
            report.update(done)

    def _demonstration(self, i: int, answer: list[int], scores: TokenScores, reward: float | None) -> dict[str, Any]:
        """What the journal keeps of the demonstration of row i."""
        return {
            "demonstration": i,
            "log_likelihood": float(scores.log_probs.sum(dtype=np.float64)),
            "worst_token": math.exp(scores.log_probs.min()),
            "too_long": len(answer) > self.settings.max_completion_length,
            "correct": reward is not None and reward >= self.settings.solved_at,
        }
