"""What samples say: pass@k of each model, the differences to the first, and a table of the problems."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trl_ext.errors import ConfigurationError
from trl_ext_mixing.estimators import Estimate, mean_difference, mean_with_interval, pass_at_k
from trl_ext_mixing.sample_file import SampleFile


@dataclass(frozen=True)
class Problem:
    """What the samples of one problem came to."""

    samples: int
    rated: int
    """Samples with a reward; to the others the reward function does not apply."""
    solved: int
    tokens: float
    """Mean length of the completions."""
    cut: int
    """Completions that `max_new_tokens` cut off."""


@dataclass(frozen=True)
class Result:
    """pass@k of one model."""

    model: str
    output: Path
    header: Mapping[str, Any]
    confidence: float
    problems: tuple[Problem, ...]
    estimates: dict[int, Estimate]
    """By k."""
    values: dict[int, dict[int, float]]
    """By k and problem; without the problems that have fewer than k rated samples."""

    @classmethod
    def of(
        cls, model: str, file: SampleFile, problems: int, ks: Sequence[int], solved_at: float, confidence: float
    ) -> Result:
        """Judge a complete file of samples, at the present `solved_at`.

        Raises:
            ConfigurationError: samples are missing, or for some k no problem has k rated samples.
        """
        found = judge_problems(file.samples, problems, file.header["settings"]["n"], solved_at)
        values = {k: {i: pass_at_k(p.rated, p.solved, k) for i, p in enumerate(found) if p.rated >= k} for k in ks}
        for k, of_problem in values.items():
            if not of_problem:
                raise ConfigurationError(
                    f"{file.path}: no problem has {k} samples with a reward, so there is no pass@{k}; lower --k, or "
                    "see why the reward function gives None"
                )
        estimates = {k: mean_with_interval(list(v.values()), confidence) for k, v in values.items()}
        return cls(model, file.path, file.header, confidence, tuple(found), estimates, values)

    @property
    def unrated(self) -> int:
        """Samples to which the reward function does not apply."""
        return sum(p.samples - p.rated for p in self.problems)

    @property
    def cut(self) -> float:
        """Share of the completions that `max_new_tokens` cut off."""
        return sum(p.cut for p in self.problems) / sum(p.samples for p in self.problems)

    def differences(self, first: Result) -> dict[int, Estimate]:
        """k to the mean difference from another model, over the problems that both have a value of."""
        result = {}
        for k, here in self.values.items():
            both = [i for i in first.values[k] if i in here]
            if both:
                result[k] = mean_difference(
                    [first.values[k][i] for i in both], [here[i] for i in both], self.confidence
                )
        return result


def judge_problems(
    samples: Mapping[tuple[int, int], Mapping[str, Any]], problems: int, n: int, solved_at: float
) -> list[Problem]:
    """Sum the samples of each problem up.

    Raises:
        ConfigurationError: a sample is missing, or is none of these problems'.
    """
    if samples.keys() != {(i, j) for i in range(problems) for j in range(n)}:
        raise ConfigurationError(
            f"the file has {len(samples)} samples, not {n} of each of {problems} problems; run the probe to its end"
        )
    result = []
    for i in range(problems):
        own = [samples[i, j] for j in range(n)]
        rewards = [s["reward"] for s in own if s["reward"] is not None]
        result.append(
            Problem(
                n,
                len(rewards),
                sum(value >= solved_at for value in rewards),
                statistics.mean(s["tokens"] for s in own),
                sum(s["cut"] for s in own),
            )
        )
    return result


def write_results(output: Path, results: Sequence[Result]) -> None:
    """Write a summary and a table of the problems beside the samples: their names are added to the whole of its."""
    summary = []
    for result in results:
        entry = {
            "model": result.model,
            "samples": str(result.output),
            **result.header,
            "confidence": result.confidence,
            "pass@k": {k: asdict(e) for k, e in result.estimates.items()},
            "without_reward": result.unrated,
            "cut": result.cut,
        }
        if result is not results[0]:
            entry["difference_from_first"] = {k: asdict(e) for k, e in result.differences(results[0]).items()}
        summary.append(entry)
    output.with_name(output.name + ".summary.json").write_text(json.dumps({"models": summary}, indent=1) + "\n")
    with output.with_name(output.name + ".problems.csv").open("w", newline="") as file:
        table = csv.writer(file)
        ks = list(results[0].values)
        names = ("model", "problem", "samples", "rated", "solved", "mean_tokens", "cut")
        table.writerow([*names, *(f"pass@{k}" for k in ks)])
        for result in results:
            for i, p in enumerate(result.problems):
                own = (result.values[k].get(i, "") for k in ks)
                table.writerow([result.model, i, p.samples, p.rated, p.solved, p.tokens, p.cut, *own])


def print_results(results: Sequence[Result]) -> None:
    """Print the estimates: a line for each k of one model, a table with a row each of several."""
    if len(results) == 1:
        (result,) = results
        for k, e in result.estimates.items():
            print(f"pass@{k}: {_percent(e)} % ({e.problems} problems, n={result.problems[0].samples})")
    else:
        rows = [["model", *(f"pass@{k}" for k in results[0].estimates)]]
        for result in results:
            rows.append([result.model, *map(_percent, result.estimates.values())])
            if result is not results[0]:
                differences = result.differences(results[0])
                rows.append(["  minus the first", *(_percent(differences.get(k), "+") for k in result.estimates)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        print(f"percent, {len(results[0].problems)} problems, n={results[0].problems[0].samples}")
    for result in results:
        if result.unrated:
            total = sum(p.samples for p in result.problems)
            print(f"{result.model}: {result.unrated} of {total} samples have no reward and are left out")
            for k, values in result.values.items():
                if left := len(result.problems) - len(values):
                    print(f"{result.model}: problems with fewer than {k} rewards, left out of pass@{k}: {left}")
        if result.cut:
            print(f"{result.model}: {100 * result.cut:.1f} % of the completions were cut off by --max-new-tokens")


def _percent(estimate: Estimate | None, sign: str = "") -> str:
    if estimate is None:
        return "-"
    return f"{100 * estimate.mean:{sign}.1f} [{100 * estimate.low:{sign}.1f}, {100 * estimate.high:{sign}.1f}]"
