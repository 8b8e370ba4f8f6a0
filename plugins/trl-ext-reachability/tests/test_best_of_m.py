"""`best-of-m`: against a loop over draws, closed-form numbers of queries, and autograd on full logits."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import checksum_reward, grpo
from test_pg import Record, sequence_gradients
from trl_ext_reachability.best_of_m import BestOfM, first_correct

from trl_ext.errors import ConfigurationError


def stop_at_the_first(correct: list[bool]) -> tuple[int | None, int]:
    """A sampler that really stops: place of the accepted draw, and draws."""
    for i, hit in enumerate(correct):
        if hit:
            return i, i + 1
    return None, len(correct)


def test_first_correct_draw_is_where_a_sampler_stops() -> None:
    correct = torch.tensor([[bool(n >> i & 1) for i in range(4)] for n in range(16)])
    first, queries = first_correct(correct, torch.ones_like(correct))
    for row, mark, asked in zip(correct.tolist(), first.tolist(), queries.tolist(), strict=True):
        place, draws = stop_at_the_first(row)
        assert (mark.index(True) if any(mark) else None, asked) == (place, draws)
        assert sum(mark) == any(row)


@pytest.mark.parametrize("p", [0.02, 0.3, 0.9])
def test_queries_have_the_mean_of_their_closed_form(p: float) -> None:
    """(1 - (1-p)^m) / p draws: 20000 contexts, four standard errors."""
    draws = torch.from_numpy(np.random.default_rng(0).random((20_000, 16)) < p)
    _, queries = first_correct(draws, torch.ones_like(draws))
    error = 4 * float(queries.float().std()) / 20_000**0.5
    assert float(queries.float().mean()) == pytest.approx((1 - (1 - p) ** 16) / p, abs=error)


def test_update_is_the_gradient_of_the_accepted_draws(tmp_path: Path) -> None:
    """The first step's gradient is -1/contexts sum_c grad log p(first correct draw of c), up to dr_grpo's length."""
    record = Record()
    trainer = grpo(
        tmp_path,
        ["best-of-m:success=0.4", "pg:rewards=given"],
        instances=[record],
        loss_type="dr_grpo",
        max_steps=1,
        max_grad_norm=0.0,
        per_device_train_batch_size=16,
    )
    trainer.train()
    rollouts = record.rollouts[0]
    correct = [reward >= 0.4 for reward in checksum_reward(rollouts.completions)]
    gradients = sequence_gradients(rollouts)
    expected, asked, solved = torch.zeros_like(gradients[0]), 0, 0
    for context in range(4):
        place, draws = stop_at_the_first(correct[4 * context : 4 * context + 4])
        asked += draws
        if place is not None:
            solved += 1
            expected -= gradients[4 * context + place] / 4 / trainer.max_completion_length
    assert 4 < asked < 16  # some context needed more than one draw, some did not need all
    # Sums over some 10^4 fp32 terms in two orders.
    torch.testing.assert_close(record.gradients[0], expected, rtol=1e-3, atol=1e-6)
    logs = trainer.state.log_history[0]
    assert logs["best-of-m/queries"] == asked / 4
    assert logs["best-of-m/solved"] == solved / 4
    assert logs["best-of-m/queries_total"] == asked


def test_queries_of_the_run_are_counted_on(tmp_path: Path) -> None:
    plugin = BestOfM(success=0.4)
    trainer = grpo(tmp_path, instances=[plugin], max_steps=3)
    trainer.train()
    logs = [log["best-of-m/queries"] for log in trainer.state.log_history[:3]]
    totals = [log["best-of-m/queries_total"] for log in trainer.state.log_history[:3]]
    assert totals == np.cumsum(logs).tolist()  # one group a step
    other = BestOfM()
    other.load_state_dict(plugin.state_dict())
    assert other.state_dict() == plugin.state_dict()
    assert other.state_dict()["total"] == totals[-1]


def test_draws_without_a_verdict_ask_nothing() -> None:
    """All 81 groups of four draws that are right, wrong or not judged: as if the last kind had not been drawn."""
    for verdicts in itertools.product((True, False, None), repeat=4):
        correct = torch.tensor([[verdict is not False for verdict in verdicts]])
        first, queries = first_correct(correct, torch.tensor([[verdict is not None for verdict in verdicts]]))
        place, asked = stop_at_the_first([verdict for verdict in verdicts if verdict is not None])
        drawn = [i for i, verdict in enumerate(verdicts) if verdict is not None]
        assert first[0].nonzero().flatten().tolist() == ([] if place is None else [drawn[place]])
        assert queries.tolist() == [asked]


def test_what_no_function_judged_is_not_correct(tmp_path: Path) -> None:
    """A context without any verdict is neither solved nor unsolved."""

    def silent(completions: list[str], **columns: object) -> list[float | None]:
        return [None, 0.0, 0.0, 0.0, *[None] * 4]

    record = Record()
    settings: dict[str, Any] = {"per_device_train_batch_size": 8, "max_steps": 1}
    trainer = grpo(tmp_path, ["best-of-m:success=0"], instances=[record], reward=silent, **settings)
    trainer.train()
    assert record.advantages_seen[0].tolist() == [0, 4, 0, 0, 0, 0, 0, 0]
    logs = trainer.state.log_history[0]
    assert [logs[f"best-of-m/{name}"] for name in ("queries", "solved", "queries_total")] == [1, 1, 1]


def test_other_advantages_are_not_thrown_away(tmp_path: Path) -> None:
    process = {"name": "process-reward", "verifier": "runs:constant_verifier"}
    for plugins in ([process, "best-of-m"], ["best-of-m", process]):
        with pytest.raises(ConfigurationError, match=r"Both set advantages anew, .* Keep one of "):
            grpo(tmp_path, plugins)
    added = {**process, "outcome": 1.0}
    with pytest.raises(ConfigurationError, match=r"set anew after it; .* Put .* before "):
        grpo(tmp_path, [added, "best-of-m"])
    grpo(tmp_path, ["best-of-m", added])
