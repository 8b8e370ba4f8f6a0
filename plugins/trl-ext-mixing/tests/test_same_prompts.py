"""Demonstrations of the very prompts that are rolled out: from a column, and as rows of the stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from branches import largest_difference
from mixing_runs import (
    Recorder,
    Rolled,
    demonstrations,
    grpo,
)
from oracles import demonstration_nll, fp32_error, gradient, model_at
from torch import Tensor
from trl_ext_mixing import ParallelAveraging

from trl_ext import hookimpl


def test_same_prompt_demonstrations_replace_the_stream(tmp_path: Path) -> None:
    data = demonstrations(12)
    rolled, seen = Rolled(), Recorder()
    trainer = grpo(
        tmp_path,
        [rolled, ParallelAveraging(demonstrations="completion", batch_size=1, coefficient=1.0)],
        recorder=seen,
        stream=False,
        data=data,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        num_generations=4,
        max_grad_norm=0.0,
        optim="sgd",
        max_steps=2,
    )
    trainer.train()
    for step, (rollouts, _, _) in enumerate(rolled.batches):
        rows = {row["prompt"]: row for row in rollouts.inputs}
        assert len(rows) == 2
        model = model_at(seen.weights[step])
        expected = gradient(model, demonstration_nll(model, list(rows.values())))
        moved = [(a - b) / 1e-2 for a, b in zip(seen.weights[step], seen.weights[step + 1], strict=True)]
        assert largest_difference(moved, expected) < 1e-6  # of fp32 log-probabilities, summed in another order


def test_evaluation_does_not_exchange_the_rows_of_the_step(tmp_path: Path) -> None:
    """With two steps a generation batch would be refused, so evaluation comes between generation and step only here."""
    data = demonstrations(12)
    plugin, rolled = ParallelAveraging(stream_row="row"), Rolled()
    rows = data.remove_columns("completion").add_column("row", list(range(12)))
    trainer = grpo(tmp_path, [rolled, plugin], stream=data, data=rows, eval_data=rows.select([11]), max_steps=1)
    trainer.train()
    chosen = list(plugin._source.rows)
    trainer.evaluate()
    assert not rolled.batches[-1][0].training
    assert plugin._source.rows == chosen == [rolled.batches[0][0].inputs[0]["row"]] != [11]


@pytest.mark.parametrize("objective", [False, True])
def test_stream_rows_of_the_same_prompts_go_through_the_stream(tmp_path: Path, objective: bool) -> None:
    """Also with an objective, which `demonstrations` does not have; the objective here doubles the loss."""

    class Double:
        requires_api = "1"
        citation = "test"

        @hookimpl
        def per_token_loss(self, tokens: Any) -> Tensor:
            return -2 * tokens.log_probs

    data = demonstrations(12)
    rolled, seen = Rolled(), Recorder()
    grpo(
        tmp_path,
        [rolled, *([Double()] if objective else []), ParallelAveraging(stream_row="row")],
        recorder=seen,
        stream=data,
        data=data.remove_columns("completion").add_column("row", list(range(12))),
        per_device_train_batch_size=8,
        max_steps=2,
    ).train()
    for step, (rollouts, _, _) in enumerate(rolled.batches):
        prompts = [row["prompt"] for row in rollouts.inputs[::4]]
        assert len(set(prompts)) == 2
        rows = [row for prompt in prompts for row in data if row["prompt"] == prompt]
        model = model_at(seen.weights[step])
        expected = gradient(model, (2 if objective else 1) * demonstration_nll(model, rows))
        # TRL's head works in fp32.
        assert largest_difference(seen.sft[step], expected) < fp32_error(expected)
