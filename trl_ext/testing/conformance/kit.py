"""`conformance`: the cases as one parametrised test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trl_ext.errors import ConfigurationError, did_you_mean
from trl_ext.records import TrainerKind
from trl_ext.testing.conformance import (
    against_formula,
    configuring,
    cost,
    equivalence,
    hooks,
    resuming,
    settings,
    several_ranks,
)
from trl_ext.testing.conformance.case import Case, outcome_of
from trl_ext.testing.conformance.subject import Subject

GROUPS = (configuring, hooks, against_formula, equivalence, resuming, settings, several_ranks, cost)
CASES: dict[str, Case] = {
    found.name: found for group in GROUPS for found in vars(group).values() if isinstance(found, Case)
}
"""All cases by name, in the order in which they run."""


def cases_of(subject: Subject) -> list[Case]:
    """The cases that mean something for a plugin.

    Raises:
        ConfigurationError: the plugin declares something unsupported that no case is about.
    """
    for name in subject.unsupported:
        if name not in CASES:
            raise ConfigurationError(
                f"plugin {type(subject.plugin).__name__} declares unsupported = {{{name!r}: ...}}, and there is no "
                f"case of this name. {did_you_mean(name, CASES)}Cases: {', '.join(CASES)}"
            )
    return [found for found in CASES.values() if subject.trainer in found.trainers and found.applies(subject)]


def conformance(
    plugin: Any,
    *,
    trainer: TrainerKind,
    streams: Mapping[str, Any] | None = None,
    reward: Callable[..., Any] | None = None,
    formula: Callable[..., Any] | None = None,
    dataset: Any = None,
    config: Mapping[str, Any] | None = None,
    unsupported: Mapping[str, str] | None = None,
) -> Callable[..., None]:
    """Give a pytest test with one case for each property that means something for a plugin.

    Args:
        plugin: an instance with the options to test; every run gets a copy of it. Its class has to be at the top of a
            module, since runs on several ranks are other processes.
        trainer: the trainer to test it in.
        streams: role to data set, for a plugin that asks for streams; sums of two numbers where None.
        reward: GRPO and RLOO: the reward function, of the top of a module; one that tells completions apart where None.
        formula: for an objective: a function of logits (N, V) and labels (N,) that gives the loss (N,) of each label,
            written from the paper; the case `formula` compares loss and gradient with it.
        dataset: the training data, where the plugin needs columns that sums of two numbers do not have.
        config: settings of the runs, where the plugin needs others than TRL's defaults.
        unsupported: cases that do not hold with these options, with the reason, beside those that the class declares;
            a run with such a setting has to be refused.

    Returns:
        The test. Assign it to a name that starts with `test_`.

    Raises:
        ConfigurationError: the plugin declares something unsupported that no case is about.
    """
    import pytest

    subject = Subject(plugin, trainer, streams, reward, formula, dataset, config or {}, unsupported or {})

    @pytest.mark.parametrize("case", [pytest.param(found, id=found.name) for found in cases_of(subject)])
    def test_conformance(case: Case, tmp_path: Path, record_property: Callable[[str, Any], None]) -> None:
        outcome = outcome_of(case, subject, tmp_path)
        record_property(case.name, f"{outcome.verdict} {outcome.remark}".strip())
        if outcome.verdict in ("skipped", "unsupported"):
            pytest.skip(f"{outcome.verdict}: {outcome.remark}")
        if outcome.verdict == "FAILED":
            raise AssertionError(f"{case.about}\n\n{outcome.remark}") from outcome.error

    return test_conformance
