"""The order of the work: contamination and floors, a learning-rate search for each arm, then all arms on all seeds."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from trl_ext.errors import ConfigurationError, NonFiniteError
from trl_ext.jobs import Job, Pool
from trl_ext_probing.fingerprints import rows_fingerprint, weights_fingerprint
from trl_ext_probing.from_scratch.arms import Base
from trl_ext_probing.from_scratch.contamination import contaminated
from trl_ext_probing.from_scratch.control_settings import FromScratchSettings
from trl_ext_probing.from_scratch.evaluating import Evaluator, Rows, has_answers, load_set
from trl_ext_probing.from_scratch.floors import Floor, floor_of
from trl_ext_probing.from_scratch.trained_run import Run
from trl_ext_probing.from_scratch.watched_training import is_trained, points_of, train
from trl_ext_probing.journal import Journal
from trl_ext_probing.rewards import Judge

Progress = tuple[str, int, int]
Key = tuple[str, float, int]
"""Arm, learning rate, seed."""


class Procedure:
    """The measurement, as far as it has come.

    Args:
        settings: what to measure; `runs` in its output holds unfinished trainings.

    Raises:
        ConfigurationError: anything that cannot work, before weights load.
    """

    def __init__(self, settings: FromScratchSettings) -> None:
        self.settings = settings
        self.run = Run(settings)
        self.base = Base(self.run.model, self.run.training.trust_remote_code)
        self.sets = {name: load_set(settings, f"--eval-{name}", path) for name, path in settings.sets.items()}
        self.validation = self._load_validation()
        self.training_rows: Rows = list(self.run.training_rows())
        self.contaminated = {
            name: contaminated(rows, self.training_rows, settings.ngram) for name, rows in self.sets.items()
        }
        self.searched: dict[Key, float] = {}
        """Validation nll in nats per token; infinite where the training diverged."""
        self.measured: dict[Key, list[dict[str, Any]]] = {}
        """Points of finished and unfinished runs, in order."""
        self.chosen: dict[str, float] = {}
        """Learning rate by arm."""

    @cached_property
    def floors(self) -> dict[str, Floor]:
        """By evaluation set."""
        found = {}
        for name, rows in self.sets.items():
            with Judge.of(self.settings.reward, rows[0], self.settings.weights) as judge:
                found[name] = floor_of(self.settings.floor_score, rows, self.training_rows, judge)
        return found

    def about(self) -> dict[str, dict[str, Any]]:
        """Everything that the results depend on."""
        sets = {**{f"--eval-{name}": rows for name, rows in self.sets.items()}, "--validation": self.validation}
        return {
            "settings": self.settings.deciding,
            "the run": self.run.yaml,
            "data": {name: rows_fingerprint(rows) for name, rows in {**sets, "training": self.training_rows}.items()},
            "weights": weights_fingerprint(self.base.path),
        }

    def steps(self, journal: Journal, pool: Pool) -> Iterator[Progress]:
        """Do what the journal does not have yet.

        Yields:
            What is being done, how many of its trainings are done, and how many there are.

        Raises:
            RuntimeError: a training failed, an arm diverged at every learning rate or at the one that it chose, or two
                arms of a seed saw different batches.
        """
        journal.append()  # the trainings under `runs` belong to it from the start
        for line in journal.lines:
            self._take(line)
        evaluator = Evaluator(self.settings, self.sets, self.validation)
        yield from self._search(journal, pool, evaluator)
        keys = [(arm, self.chosen[arm], seed) for seed in self.run.seeds for arm in self.run.arms]
        for number, key in enumerate(keys):
            self._measure(journal, pool, evaluator, key)
            yield "arms and seeds", number + 1, len(keys)
        self.forget_runs()

    def forget_runs(self) -> None:
        """Remove unfinished trainings, which belong to another measurement."""
        shutil.rmtree(self.settings.output / "runs", ignore_errors=True)

    def _search(self, journal: Journal, pool: Pool, evaluator: Evaluator) -> Iterator[Progress]:
        rates, arms = self.run.rates, self.run.arms
        seeds = self.run.seeds[: self.settings.search_seeds]
        if len(rates) == 1:
            self.chosen = dict.fromkeys(arms, rates[0])
            return
        done, total = 0, len(rates) * len(arms) * len(seeds)
        for arm in arms:
            for rate in rates:
                for seed in seeds:
                    if (arm, rate, seed) not in self.searched:
                        nll = self._try(pool, evaluator, (arm, rate, seed))
                        line = {"part": "search", "arm": arm, "rate": rate, "seed": seed, "nll": nll}
                        journal.append(line)
                        self._take(line)
                    done += 1
                    yield "learning rates", done, total
                self.chosen[arm] = self._keep_best(arm)
            if math.isinf(self.search_nll(arm, self.chosen[arm])):
                raise RuntimeError(f"every learning rate of the arm {arm!r} diverged; search lower ones")

    def _keep_best(self, arm: str) -> float:
        """The best rate so far. Only its models are kept, since they may be among those to measure."""
        seeds = self.run.seeds[: self.settings.search_seeds]
        known = [rate for rate in self.run.rates if all((arm, rate, seed) in self.searched for seed in seeds)]
        best = min(known, key=lambda rate: self.search_nll(arm, rate))
        for rate in known:
            for seed in seeds:
                if rate != best or self.settings.search_share < 1:
                    shutil.rmtree(self._folder((arm, rate, seed), self.settings.search_share), ignore_errors=True)
        return best

    def search_nll(self, arm: str, rate: float) -> float:
        """Mean over the seeds of the search; infinite where one diverged."""
        seeds = self.run.seeds[: self.settings.search_seeds]
        return sum(self.searched[arm, rate, seed] for seed in seeds) / len(seeds)

    def _try(self, pool: Pool, evaluator: Evaluator, key: Key) -> float | None:
        try:
            folder = self._train(pool, key, self.settings.search_share)
        except NonFiniteError:
            return None
        return evaluator.validation_nll(points_of(folder)[-1].folder)

    def _measure(self, journal: Journal, pool: Pool, evaluator: Evaluator, key: Key) -> None:
        finished = self.measured.get(key, [])
        if finished and finished[-1]["last"]:
            return
        arm, rate, seed = key
        try:
            folder = self._train(pool, key)
            for point in points_of(folder)[len(finished) :]:
                line = {
                    "part": "point",
                    **{"arm": arm, "rate": rate, "seed": seed},
                    **{"step": point.step, "tokens": point.tokens, "batches": point.batches, "last": point.last},
                    "sets": evaluator.evaluate(point.folder),
                }
                self._check_batches(line)
                journal.append(line)
                self._take(line)
        except NonFiniteError as error:
            raise RuntimeError(
                f"the arm {arm!r} diverged at {rate:g} on seed {seed}: search lower rates, or on more --search-seeds"
            ) from error
        shutil.rmtree(folder)

    def _check_batches(self, line: dict[str, Any]) -> None:
        for (arm, _, seed), points in self.measured.items():
            for other in points:
                if seed == line["seed"] and other["step"] == line["step"] and other["batches"] != line["batches"]:
                    raise RuntimeError(
                        f"the arms {arm!r} and {line['arm']!r} of seed {seed} saw different batches up to step "
                        f"{line['step']}: they are not comparable"
                    )

    def _train(self, pool: Pool, key: Key, share: float = 1.0) -> Path:
        arm, rate, seed = key
        folder = self._folder(key, share)
        if not is_trained(folder):
            arguments = {
                **{"config": self.settings.config, "folder": folder, "rate": rate, "seed": seed, "share": share},
                "start": self.base.start(arm, seed, folder / "start"),
                "points": self.settings.points if share == 1 else 1,
            }
            (outcome,) = pool.run([[Job(f"{arm}, seed {seed}, learning rate {rate:g}", folder, train, arguments)]])
            if outcome.error:
                raise RuntimeError(outcome.error)
            if outcome.result:
                raise NonFiniteError(outcome.result)
        return folder

    def _folder(self, key: Key, share: float = 1.0) -> Path:
        arm, rate, seed = key
        return self.settings.output / "runs" / f"{arm}-{rate:g}-seed{seed}{'' if share == 1 else '-short'}"

    def _take(self, line: dict[str, Any]) -> None:
        key = line["arm"], line["rate"], line["seed"]
        if line["part"] == "search":
            self.searched[key] = math.inf if line["nll"] is None else line["nll"]
        else:
            self.measured.setdefault(key, []).append(line)

    def _load_validation(self) -> Rows:
        s = self.settings
        rows = self.sets.get("in", []) if s.validation is None else load_set(s, "--validation", s.validation)
        if len(self.run.rates) > 1 and not has_answers(rows):
            option = "--eval-in" if s.validation is None else "--validation"
            raise ConfigurationError(
                f"{option}: rows without 'completion' have no nll to choose learning rates by; give --validation with "
                "completions, or one rate by --learning-rates"
            )
        return rows
