"""The conformance kit: sound plugins pass every case, and each case finds a plugin that is broken in its way."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from broken_plugins import BROKEN, EveryStep, NoCompletionNoNumber, NoStreamNoNumber, Weighs, WeighsWell
from sound_plugins import Average, Away, Focal, SofterNegatives, focal_loss
from torch import nn

from trl_ext import hookimpl
from trl_ext.cli.conformance import run_cases
from trl_ext.cli.plugin_commands import check
from trl_ext.errors import ConfigurationError
from trl_ext.hookspecs import WITH_LM_HEAD
from trl_ext.records import TRAINERS
from trl_ext.testing.conformance import CASES, Outcome, Subject, cases_of, conformance, outcome_of

FAST = {"options_in_config", "changes_something", "records_unmodified", "state_survives_json", "packing"}
"""Cases whose broken plugin is tried in the fast tests too."""

test_focal = pytest.mark.slow(conformance(Focal(), trainer="sft", formula=focal_loss))
test_average = pytest.mark.slow(conformance(Average(), trainer="sft"))
test_away = pytest.mark.slow(conformance(Away(), trainer="sft"))
test_softer_negatives = pytest.mark.slow(conformance(SofterNegatives(), trainer="grpo"))


def test_each_case_has_a_plugin_that_breaks_it() -> None:
    assert set(BROKEN) == set(CASES) - {"cost"}  # which measures


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in BROKEN])
def test_a_case_finds_the_plugin_that_is_broken_in_its_way(name: str, tmp_path: Path) -> None:
    subject, said = BROKEN[name]
    assert CASES[name] in cases_of(subject)
    outcome = outcome_of(CASES[name], subject, tmp_path)
    assert outcome.verdict == "FAILED", outcome
    assert said in outcome.remark


@dataclass
class Judged:
    """Its secret is masked wherever a run shows it."""

    api_key: str = "swordfish"
    endpoint: str = field(default="open sesame", repr=False)


def test_a_secret_comes_back_from_a_config_as_it_is(tmp_path: Path) -> None:
    outcome = outcome_of(CASES["options_in_config"], Subject(Judged(), "sft"), tmp_path)
    assert outcome.verdict == "passed", outcome


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plugin", "trainer", "said"),
    [
        (NoCompletionNoNumber(), "grpo", "NaN or infinite"),
        (NoStreamNoNumber(), "grpo", "ZeroDivisionError"),
        (Weighs(), "sft", "ZeroDivisionError"),
    ],
    ids=["completions", "stream", "columns"],
)
def test_a_rank_without_labels_is_one_in_every_trainer_and_with_columns(
    plugin: Any, trainer: Any, said: str, tmp_path: Path
) -> None:
    outcome = outcome_of(CASES["rank_without_labels"], Subject(plugin, trainer), tmp_path)
    assert outcome.verdict == "FAILED", outcome
    assert said in outcome.remark


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plugin", "trainer"),
    [(SofterNegatives(), "grpo"), (Away(), "grpo"), (WeighsWell(), "sft")],
    ids=["completions", "stream", "columns"],
)
def test_a_sound_plugin_trains_with_a_rank_without_labels(plugin: Any, trainer: Any, tmp_path: Path) -> None:
    outcome = outcome_of(CASES["rank_without_labels"], Subject(plugin, trainer), tmp_path)
    assert outcome.verdict == "passed", outcome


def test_the_ratio_of_costs_counts_an_extra_forward(tmp_path: Path) -> None:
    """A training step is a forward and a backward of twice its operations, so that one more forward makes 4/3."""
    outcome = outcome_of(CASES["cost"], Subject(EveryStep(), "sft"), tmp_path)
    assert outcome.verdict == "passed"
    assert 1.2 < float(outcome.remark.partition("x")[0]) < 1.5


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def options_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """One case, which trains nothing."""
    monkeypatch.setattr("trl_ext.cli.conformance.cases_of", lambda subject: [CASES["options_in_config"]])


@pytest.mark.parametrize(
    ("text", "trainers"),
    [
        ("power:alpha=0.5", ["sft"]),
        ("weighted", ["sft"]),
        ("gradient-surgery", list(WITH_LM_HEAD)),
        ("adaptive-lr", list(TRAINERS)),
        ("pg", ["grpo"]),
    ],
)
def test_a_plugin_is_run_in_the_trainers_that_it_acts_in(options_only: None, text: str, trainers: list[str]) -> None:
    found = [(trainer, outcome.verdict) for trainer, _, outcome in run_cases(text)]
    assert found == [(trainer, "passed") for trainer in trainers]


def test_the_command_prints_a_table(options_only: None, capsys: pytest.CaptureFixture[str]) -> None:
    check("power", run=True)
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["trainer", "case", "verdict", "remark"],
        ["sft", "options_in_config", "passed"],
    ]


def test_the_command_fails_where_a_case_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl_ext.cli.conformance.outcome_of", lambda *_: Outcome("FAILED", "it was another one"))
    with pytest.raises(typer.Exit):
        check("power", run=True)
    with pytest.raises(ConfigurationError, match="--run takes the name of one plugin"):
        check(None, run=True)


# -- what a plugin declares not to support -----------------------------------------------------------------------------


class NoPacking(Focal):
    unsupported = {"packing": "Rows are taken for samples."}


class NoSuchCase(Focal):
    unsupported = {"pakcing": "Rows are taken for samples."}


class SaysNothing(Focal):
    unsupported = {"changes_something": "It is the baseline."}


def test_a_declared_setting_is_refused_and_reported(tmp_path: Path) -> None:
    subject = Subject(NoPacking(), "sft")
    outcome = outcome_of(CASES["packing"], subject, tmp_path)
    assert (outcome.verdict, outcome.remark) == ("unsupported", "Rows are taken for samples.")
    with pytest.raises(ConfigurationError, match=r"NoPacking.* does not support packing: Rows .*; set packing=False"):
        subject.build(tmp_path / "run", packing=True)


def test_a_declared_limit_that_no_run_is_held_to_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trl_ext.startup import unsupported

    monkeypatch.delitem(unsupported.SETTINGS, "packing")
    outcome = outcome_of(CASES["packing"], Subject(NoPacking(), "sft"), tmp_path)
    assert outcome.verdict == "FAILED"
    assert "no run was refused" in outcome.remark


@dataclass(eq=False)
class UnpackedWhenStrict(Focal):
    strict: bool = True

    @hookimpl
    def check(self, run):
        if self.strict and run.args.packing:
            raise ValueError("strict=True takes rows for samples; set packing=False, or strict=False")


def test_a_setting_that_the_check_hook_refuses_with_these_options_is_reported(tmp_path: Path) -> None:
    verdicts = [
        outcome_of(CASES["packing"], Subject(UnpackedWhenStrict(strict=strict), "sft"), tmp_path / str(strict))
        for strict in (True, False)
    ]
    assert [outcome.verdict for outcome in verdicts] == ["unsupported", "passed"]
    assert "strict=True takes rows for samples" in verdicts[0].remark


def test_a_property_that_is_not_claimed_is_not_run(tmp_path: Path) -> None:
    outcome = outcome_of(CASES["changes_something"], Subject(SaysNothing(), "sft"), tmp_path)
    assert (outcome.verdict, outcome.remark) == ("unsupported", "It is the baseline.")


def test_an_unknown_case_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"unsupported = \{'pakcing': \.\.\.\}.* Did you mean 'packing'"):
        conformance(NoSuchCase(), trainer="sft")


def test_bf16_weights_are_refused_once_the_model_is_there(tmp_path: Path) -> None:
    from trl_ext.records import RunDescription
    from trl_ext.startup.unsupported import SETTINGS

    def run(model: nn.Module | str) -> RunDescription:
        return RunDescription("sft", None, model, (), (), (), False, 1, "none")

    models = ("id", nn.Linear(2, 2), nn.Linear(2, 2).to(torch.bfloat16))
    assert [SETTINGS["bf16_weights"](run(m)) for m in models] == ["", "", "load the model in float32"]
