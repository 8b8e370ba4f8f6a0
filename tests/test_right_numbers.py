"""Numbers that would be wrong without a sign are right, or the run stops and says which line to change."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import pytest
import torch
from helpers import Plugin, additions, logged, make_grpo

from trl_ext import hookimpl
from trl_ext.errors import PluginError
from trl_ext.records import AuxiliaryLoss


@dataclass(eq=False)
class Constant(Plugin):
    """An auxiliary loss of 1 for each row, whatever the number of tokens; notes the label tokens of each micro-step."""

    per: Any = "token"
    tokens: list[int] = field(default_factory=list)

    @hookimpl
    def auxiliary_losses(self, micro_step):
        self.tokens.append(int(micro_step.mask.sum()))
        return {"rows": AuxiliaryLoss(0 * micro_step.log_probs.sum() + len(micro_step.log_probs), self.per)}


# -- auxiliary losses of GRPO per label token ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accumulation", "generation", "iterations"), [(1, 2, 1), (2, 4, 1), (1, 3, 2), (2, 3, 2)], ids=str
)
def test_a_grpo_term_per_token_is_divided_by_its_own_windows_tokens(tmp_path, accumulation, generation, iterations):
    """A generation batch of several windows: each has its own number of label tokens."""
    plugin = Constant()
    sizes = {"gradient_accumulation_steps": accumulation, "steps_per_generation": generation}
    steps = generation * iterations // accumulation
    trainer = make_grpo(tmp_path / "run", plugins=[plugin], num_iterations=iterations, max_steps=steps, **sizes)
    trainer.train()
    windows = [sum(plugin.tokens[i : i + accumulation]) for i in range(0, len(plugin.tokens), accumulation)]
    assert len(set(windows)) > 1, "windows of equal length show nothing"
    shown = [entry["Constant/rows"] for entry in logged(trainer) if "Constant/rows" in entry]
    assert shown == pytest.approx([4 * accumulation / tokens for tokens in windows], rel=1e-6)


def test_a_grpo_term_per_token_is_refused_where_the_window_outlasts_its_completions(tmp_path):
    sizes = {"gradient_accumulation_steps": 2, "steps_per_generation": 1, "max_steps": 1}
    message = r"'Constant'.*'auxiliary_losses' at step 1: ValueError: term 'rows' is per token.*make steps_per_generation"
    with pytest.raises(PluginError, match=message):
        make_grpo(tmp_path / "run", plugins=[Constant()], **sizes).train()
    make_grpo(tmp_path / "run", plugins=[Constant("sequence")], **sizes).train()


# -- the table of completions ----------------------------------------------------------------------------------------


@dataclass(eq=False)
class Ranked(Plugin):
    """Advantages that count the completions from 0, for each completion or for each token."""

    per_token: bool = False

    @hookimpl
    def advantages(self, advantages, rollouts):
        ranked = torch.arange(len(advantages), dtype=advantages.dtype)
        if not self.per_token:
            return ranked
        outside = torch.where(rollouts.mask.bool(), 0.0, 99.0)  # nothing is trained on there
        return outside + ranked[:, None]


@pytest.mark.parametrize("per_token", [False, True], ids=["completion", "token"])
def test_the_table_of_completions_shows_the_advantages_trained_on(tmp_path, per_token):
    files = {"log_completions": True, "num_completions_to_print": 0, "max_steps": 2, "steps_per_generation": 2}
    trainer = make_grpo(tmp_path / "run", plugins=[Ranked(per_token)], **files)
    trainer.train()
    table = pd.read_parquet(tmp_path / "run" / "completions" / "completions_00001.parquet")
    assert table["advantage"].tolist() == pytest.approx(list(range(8)))


def test_evaluation_shows_its_advantages_too(tmp_path):
    held_out = {"eval_dataset": additions(4, "prompt_only", seed=5)}
    trainer = make_grpo(tmp_path / "run", plugins=[Ranked()], trainer=held_out)
    trainer.evaluate()
    assert list(trainer._logs["advantages"]) == [0, 1, 2, 3]
