"""The run of `compare`: the model before any training, learning rates, then every arm on every seed; and the files."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from trl_ext.cli import check
from trl_ext.errors import ConfigurationError
from trl_ext.jobs import Pool
from trl_ext.specs import PLUGINS_VARIABLE
from trl_ext_probing.comparing.arm_runs import Run
from trl_ext_probing.comparing.compare_files import write_comparison
from trl_ext_probing.comparing.compare_settings import CompareSettings
from trl_ext_probing.comparing.comparison import Arm, Comparison, Tuning, read_comparison
from trl_ext_probing.journal import Journal
from trl_ext_probing.progress import say
from trl_ext_probing.ranks import refuse_several

Values = dict[str, float | None]


def run(settings: CompareSettings) -> None:
    """Train and measure what is not there yet, and write the results.

    Raises:
        ConfigurationError: Anything that cannot work, before anything is trained; or, after the results are written, a
            run that failed.
    """
    refuse_several("compare")
    if os.environ.get(PLUGINS_VARIABLE):
        raise ConfigurationError(
            f"{PLUGINS_VARIABLE} is set, and each arm without plugins would train with those; unset it, and name them "
            "in the file"
        )
    asked = read_comparison(settings)
    refuse_trainings(asked)
    refuse_measures(asked)
    with Journal(settings.output / "lock.jsonl", {}), Pool() as pool:  # the journal: one run at a time
        work = Work(settings, asked, pool)
        work.do()
        write_comparison(settings, asked, work.runs, work.values, work.rates)
    if work.errors:
        raise ConfigurationError(f"{len(work.errors)} of the runs failed, the first so: {work.errors[0]}")
    if missing := [run.name for run in work.runs if run.name not in work.values]:
        say(f"not there yet, since the budget is used up: {'; '.join(missing)}. The same command goes on with them")


def refuse_trainings(asked: Comparison) -> None:
    """Refuse what the training commands would refuse before a model loads, for every arm.

    Raises:
        ConfigurationError: With the arm and the setting to change.
    """
    with TemporaryDirectory() as folder:
        for arm in asked.arms:
            for stage in arm.stages:
                file = Path(folder, "config.yaml")
                file.write_text(yaml.safe_dump({**stage.settings, "output_dir": str(Path(folder, "model"))}))
                try:
                    check(stage.kind, ["--config", str(file)])
                except ConfigurationError as error:
                    reason = str(error).removeprefix(f"{file}: ")
                    raise ConfigurationError(f"{asked.where}: arms: {arm.name!r}: {reason}") from None


def refuse_measures(asked: Comparison) -> None:
    """Refuse measures whose data or functions cannot be used.

    Raises:
        ConfigurationError: With the measure.
    """
    for measure in asked.measures.values():
        try:
            measure.refuse(asked.base_model)
        except ConfigurationError as error:
            raise ConfigurationError(f"{measure.where}: {str(error).removeprefix(measure.where).strip(': ')}") from None


@dataclass
class Work:
    """A comparison as far as it has come."""

    settings: CompareSettings
    asked: Comparison
    pool: Pool
    values: dict[str, Values] = field(default_factory=dict)
    """By the name of a run."""
    rates: dict[str, float] = field(default_factory=dict)
    """Learning rate that was chosen for an arm."""
    errors: list[str] = field(default_factory=list)
    until: float | None = None

    def do(self) -> None:
        """Train and measure; what is there already is used.

        Raises:
            ConfigurationError: The model before any training cannot be measured, so that no other one could.
        """
        if self.asked.minutes is not None:
            self.until = time.monotonic() + 60 * self.asked.minutes
        if self.asked.tuning is not None:
            self._tune(self.asked.tuning)
        ready = [run for run in self.runs if self._is_ready(run)]
        self.errors += self._do(ready).values()

    @cached_property
    def base(self) -> Run:
        """The model before any training."""
        return Run(self.asked, self.settings.output, None, measures=tuple(self.asked.measures))

    @cached_property
    def runs(self) -> list[Run]:
        """The model before any training, and the runs that are reported, seed by seed, so that pairs are whole.

        They have the learning rates that are chosen by then.
        """
        every = tuple(self.asked.measures)
        trained = [self._run(arm, seed, every) for seed in self.asked.seeds for arm in self.asked.arms]
        return [self.base, *trained]

    def _run(self, arm: Arm, seed: int, measures: tuple[str, ...]) -> Run:
        return Run(self.asked, self.settings.output, arm, seed, self.rates.get(arm.name), measures)

    def _is_ready(self, run: Run) -> bool:
        """Whether it has the learning rate that it is to have."""
        return run.arm is None or self.asked.tuning is None or run.arm.name in self.rates

    def _tune(self, tuning: Tuning) -> None:
        """Choose a learning rate for each arm by its mean over seeds that are not reported.

        An arm whose search the budget has cut off gets none yet; one of which no rate has a value is an error.
        """
        tried = {
            arm.name: {
                rate: [replace(self._run(arm, seed, (tuning.measure,)), rate=rate) for seed in tuning.seeds]
                for rate in tuning.rates
            }
            for arm in self.asked.arms
        }
        every = [run for rates in tried.values() for runs in rates.values() for run in runs]
        failed = self._do([self.base, *every])  # a rate that diverges is an answer
        metric = f"{tuning.measure}/{tuning.metric}".removesuffix("/")
        sign = 1 if self.asked.measures[tuning.measure].better(tuning.metric) == "lower" else -1
        for arm, rates in tried.items():
            names = [run.name for runs in rates.values() for run in runs]
            if any(name not in self.values and name not in failed for name in names):
                continue
            scores = {rate: self._mean(runs, metric) for rate, runs in rates.items()}
            known = {rate: sign * score for rate, score in scores.items() if score is not None}
            if not known:
                why = next((failed[name] for name in names if name in failed), "it is undefined")
                self.errors.append(f"{arm}: no learning rate of `tune` has a value of {metric}: {why}")
                continue
            self.rates[arm] = min(known, key=lambda rate: known[rate])
            say(f"{arm}: learning rate {self.rates[arm]:g} of {', '.join(f'{rate:g}' for rate in tuning.rates)}")

    def _mean(self, runs: Sequence[Run], metric: str) -> float | None:
        found = [self.values.get(run.name, {}).get(metric) for run in runs]
        known = [value for value in found if value is not None]
        return statistics.mean(known) if len(known) == len(runs) else None

    def _do(self, runs: Sequence[Run]) -> Mapping[str, str]:
        """Do runs; gives why some failed, by name."""
        chains = [run.jobs() for run in runs]
        of_job = {job: run for run, chain in zip(runs, chains, strict=True) for job in chain}
        last = {chain[-1] for chain in chains}
        for run in runs:
            run.write_configs()
        devices = () if self.asked.on_cpu or self.asked.launches else _devices()
        at_once = 1 if self.asked.launches else self.asked.at_once or max(1, len(devices))
        threads = max(1, (os.cpu_count() or 1) // at_once) if self.asked.on_cpu and at_once > 1 else None
        failed: dict[str, str] = {}
        for outcome in self.pool.run(chains, at_once=at_once, devices=devices, threads=threads, until=self.until):
            run = of_job[outcome.job]
            if outcome.error and run.arm is None:
                raise ConfigurationError(f"the model before any training cannot be measured: {outcome.error}")
            if outcome.error:
                failed[run.name] = outcome.error
                say(outcome.error)
            elif outcome.job in last and run.name not in self.values:
                self.values[run.name] = outcome.result
                shown = (f"{k} {'undefined' if v is None else f'{v:.4g}'}" for k, v in outcome.result.items())
                say(f"{run.name}: {', '.join(shown)}")
        return failed


def _devices() -> tuple[str, ...]:
    """The accelerators that this process may use, as CUDA_VISIBLE_DEVICES numbers them."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(visible.split(",")) if visible else tuple(map(str, range(torch.cuda.device_count())))
