"""Faults that authors of plugins make late: in what they return, and what they are told of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Idle, Plugin

from trl_ext import hookimpl
from trl_ext.errors import CheckpointError, ConfigurationError, PluginError
from trl_ext.plugins.discovery import load_plugin
from trl_ext.testing.runs import make_sft

SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}


@dataclass(eq=False)
class Keeps(Idle):
    """A state that the test chooses."""

    give: Callable[[], Any] = dict

    def state_dict(self) -> Any:
        return self.give()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "the state of plugin 'Keeps' .* is a NoneType instead of a dictionary"),
        ({"seen": {1: 2}}, r"state_dict\(\)\['seen'\] has the key 1, and JSON gives back a text; return '1'"),
        ({"a": [{"b": (1, 2)}]}, r"state_dict\(\)\['a'\]\[0\]\['b'\] is a tuple, and JSON gives back a list; return a"),
    ],
)
def test_a_state_that_would_come_back_as_another_one_is_refused(tmp_path: Path, state: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        make_sft(tmp_path / "run", plugins=[Keeps(lambda: state)], **SAVING).train()


def test_a_state_that_raises_names_its_plugin(tmp_path: Path) -> None:
    def fail() -> Any:
        raise KeyError("mean")

    with pytest.raises(CheckpointError, match=r"plugin 'Keeps' .* failed in state_dict\(\): KeyError: 'mean'"):
        make_sft(tmp_path / "run", plugins=[Keeps(fail)], **SAVING).train()


class OneBadNumber(Plugin):
    @hookimpl
    def metrics(self) -> dict[str, Any]:
        return {"good": 3.0, "pair": torch.ones(2), "text": "many"}


def test_a_metric_that_is_no_number_is_named_once_and_the_others_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_sft(tmp_path / "run", plugins=[OneBadNumber()], max_steps=2)
    with caplog.at_level(logging.WARNING, logger="trl_ext"):
        trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["OneBadNumber/good"] for entry in entries] == [3.0, 3.0]
    assert not any("OneBadNumber/pair" in entry or "OneBadNumber/text" in entry for entry in entries)
    said = [record.message for record in caplog.records if "OneBadNumber" in record.message]
    assert len(said) == 2
    assert "failed in hook 'metrics' at step" in said[0]
    assert "its 'pair' is no number (" in said[0]
    assert "its 'text' is no number (ValueError" in said[1]


class Around(torch.optim.SGD):
    """Keeps the optimiser that it was given; `share` says whether its groups too."""

    def __init__(self, inner: torch.optim.Optimizer, share: bool) -> None:
        super().__init__([dict(group) for group in inner.param_groups], lr=0.1)
        self.inner = inner
        if share:
            self.param_groups = inner.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


@dataclass(eq=False)
class Wraps(Plugin):
    share: bool = False

    @hookimpl
    def wrap_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        return Around(optimizer, self.share)


def test_an_optimiser_with_copies_of_the_inner_groups_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"with copies of its param_groups, .*; write self.param_groups = "):
        make_sft(tmp_path / "run", plugins=[Wraps()], max_steps=1).train()
    make_sft(tmp_path / "shared", plugins=[Wraps(share=True)], max_steps=1).train()


@pytest.mark.parametrize("source", ["from trl_ext.hookspecs import not_yet", "import trl_ext.not_yet"])
def test_an_import_that_a_newer_core_would_have_is_said_to_be_one(site: Any, source: str) -> None:
    site.add("trl-ext-later", plugins={"later": "later:Later"}, files={"later.py": source})
    with pytest.raises(ConfigurationError, match=r"It was written for another trl-ext, and plugin API 1\.\d+ is"):
        load_plugin("later")
