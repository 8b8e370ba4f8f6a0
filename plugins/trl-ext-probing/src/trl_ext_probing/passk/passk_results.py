"""What samples say: pass@k of each model, the differences to the first, a table of the problems, and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trl_ext.errors import ConfigurationError
from trl_ext_probing.intervals import Estimate, mean_difference, mean_with_interval
from trl_ext_probing.passk.estimator import pass_at_k
from trl_ext_probing.passk.passk_settings import PasskSettings
from trl_ext_probing.plots import draw_estimates, figure, save, short_names
from trl_ext_probing.results import write_results
from trl_ext_probing.sampling import Samples
from trl_ext_probing.tables import percent, table


@dataclass(frozen=True)
class Problem:
    """What the samples of one problem came to."""

    samples: int
    rated: int
    """Samples with a reward; to the others the reward function does not apply."""
    solved: int
    mean_tokens: float | None
    """Mean length of the completions; None where the engine does not tell it."""
    cut: int
    """Completions that reached the longest length."""

    @classmethod
    def of(cls, samples: Sequence[Mapping[str, Any]], solved_at: float) -> Problem:
        """Sum the samples up."""
        rewards = [sample["reward"] for sample in samples if sample["reward"] is not None]
        tokens = [sample["tokens"] for sample in samples if sample["tokens"] is not None]
        return cls(
            samples=len(samples),
            rated=len(rewards),
            solved=sum(reward >= solved_at for reward in rewards),
            mean_tokens=statistics.mean(tokens) if tokens else None,
            cut=sum(sample["cut"] for sample in samples),
        )


@dataclass(frozen=True)
class Result:
    """pass@k of one model."""

    model: str
    about: Mapping[str, Any]
    confidence: float
    problems: tuple[Problem, ...]
    estimates: dict[int, Estimate]
    """By k."""
    values: dict[int, dict[int, float]]
    """By k and problem; without the problems that have fewer than k rated samples."""

    @classmethod
    def of(cls, model: str, about: Mapping[str, Any], samples: Samples, settings: PasskSettings) -> Result:
        """Judge the first n samples of each problem, at the present `solved_at`.

        Raises:
            ConfigurationError: For some k, no problem has k rated samples.
        """
        numbers = range(settings.n)
        found = [
            Problem.of([samples.held[i, j] for j in numbers], settings.solved_at) for i in range(len(samples.rows))
        ]
        ks = settings.ks
        values = {k: {i: pass_at_k(p.rated, p.solved, k) for i, p in enumerate(found) if p.rated >= k} for k in ks}
        for k, of_problem in values.items():
            if not of_problem:
                raise ConfigurationError(
                    f"{model}: no problem has {k} samples with a reward, so there is no pass@{k}; lower --k, or see "
                    "why the reward function gives None"
                )
        estimates = {k: mean_with_interval(list(v.values()), settings.confidence) for k, v in values.items()}
        return cls(model, about, settings.confidence, tuple(found), estimates, values)

    @property
    def unrated(self) -> int:
        """Samples to which the reward function does not apply."""
        return sum(p.samples - p.rated for p in self.problems)

    @property
    def cut(self) -> float:
        """Share of the completions that reached the longest length."""
        return sum(p.cut for p in self.problems) / sum(p.samples for p in self.problems)

    def differences(self, first: Result) -> dict[int, Estimate]:
        """k to the mean difference from another model, over the problems that both have a value of."""
        result = {}
        for k, here in self.values.items():
            both = [i for i in first.values[k] if i in here]
            if both:
                before, after = ([values[i] for i in both] for values in (first.values[k], here))
                result[k] = mean_difference(before, after, self.confidence)
        return result

    def notes(self) -> Iterator[str]:
        """What a reader of the estimates has to know."""
        if self.unrated:
            total = sum(p.samples for p in self.problems)
            yield f"{self.model}: {self.unrated} of {total} samples have no reward and are left out"
            for k, values in self.values.items():
                if left := len(self.problems) - len(values):
                    yield f"{self.model}: problems with fewer than {k} rewards, left out of pass@{k}: {left}"
        if self.cut:
            yield f"{self.model}: {100 * self.cut:.1f} % of the completions reached --max-completion-length"


def write_passk(settings: PasskSettings, results: Sequence[Result]) -> None:
    """Write the results of all models, the first of which the others are compared with."""
    models = [
        {
            "model": result.model,
            "weights": result.about["weights"],
            "pass@k": {str(k): asdict(e) for k, e in result.estimates.items()},
            "difference_from_first": {str(k): asdict(e) for k, e in result.differences(results[0]).items()}
            if result is not results[0]
            else None,
            "without_reward": result.unrated,
            "cut": result.cut,
        }
        for result in results
    ]
    rows = (
        {"model": r.model, "row": i, **asdict(p), **{f"pass@{k}": r.values[k].get(i) for k in r.values}}
        for r in results
        for i, p in enumerate(r.problems)
    )
    content = {"data": results[0].about["data"], "models": models}
    write_results(settings, content, rows, describe(settings, results), lambda path: draw(settings, results, path))


def describe(settings: PasskSettings, results: Sequence[Result]) -> str:
    """The estimates of each model, and the differences to the first, in percent."""
    lines = []
    for result in results:
        lines.append([result.model, *map(percent, result.estimates.values())])
        if result is not results[0]:
            differences = result.differences(results[0])
            lines.append(["minus the first", *(percent(differences.get(k), "+") for k in result.estimates)])
    text = table(["model", *(f"pass@{k}" for k in settings.ks)], lines)
    count = len(results[0].problems)
    about = f"Percent, with {settings.confidence:.0%} intervals over {count} problems; {settings.n} samples of each."
    return "\n".join([text, about, *(note for result in results for note in result.notes())])


def draw(settings: PasskSettings, results: Sequence[Result], path: Path) -> None:
    """pass@k against k, a line for each model."""
    whole, axis = figure()
    ks = settings.ks
    names = short_names(result.model for result in results)
    for i, (name, result) in enumerate(zip(names, results, strict=True)):
        shift = 1.03 ** (i - (len(results) - 1) / 2)  # so that no interval hides another one
        draw_estimates(axis, [k * shift for k in ks], [result.estimates[k] for k in ks], i, name)
    highest = max(e.bounds[2] for result in results for e in result.estimates.values())
    axis.set_xscale("log", base=2)
    axis.set_xticks(ks, [str(k) for k in ks])
    axis.set(
        xlabel="k (samples of a problem)",
        ylabel="pass@k (share of problems solved)",
        ylim=(-0.02 * highest, 1.05 * highest),  # of a weak model, too, something is to be seen
        title=f"{settings.confidence:.0%} intervals over {len(results[0].problems)} problems",
    )
    axis.legend(fontsize=8)
    save(whole, path)
