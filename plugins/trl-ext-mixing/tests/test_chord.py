"""CHORD against its formula and the authors' schedule, with gradients taken here on full logits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from branches import largest_difference
from mixing_runs import (
    EXACT,
    Late,
    Recorder,
    demonstrations,
    grpo,
)
from oracles import combine, gradient, model_at, token_log_probs
from trl_ext_mixing import Chord

from trl_ext.testing import tiny_tokenizer


def test_chord_is_the_weighted_sum_with_mu_on_its_schedule(tmp_path: Path) -> None:
    before, after = Recorder(), Late()
    trainer = grpo(tmp_path, [Chord(mu=0.8, mu_end=0.2, decay=0.5, schedule="linear"), after], recorder=before)
    trainer.train()
    mus = [0.8, 0.5, 0.2, 0.2]
    for step, mu in enumerate(mus):
        expected = combine(before.rl[step], before.sft[step], 1 - mu, mu)
        assert largest_difference(after.rl[step], expected) < EXACT
    assert [v for e in trainer.state.log_history for k, v in e.items() if k.endswith("/mu")] == pytest.approx(mus)


def test_a_cosine_schedule_is_half_way_in_the_middle_and_flat_at_its_ends(tmp_path: Path) -> None:
    trainer = grpo(tmp_path, [Chord(mu=1.0, mu_end=0.0, decay=1)], max_steps=4)
    trainer.train()
    logged = [v for e in trainer.state.log_history for k, v in e.items() if k.endswith("/mu")]
    assert logged == pytest.approx([(1 + math.cos(math.pi * t)) / 2 for t in (0, 0.25, 0.5, 0.75)])


def test_a_schedule_goes_on_where_the_run_is_when_plugin_states_are_reset(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    grpo(tmp_path, ["chord:mu=0.9,mu_end=0.1,decay=1,schedule=linear"], **settings).train()
    trainer = grpo(tmp_path, ["chord:mu=0.9,mu_end=0.1,decay=1,schedule=linear"], reset_plugin_state=True, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    logged = [v for e in trainer.state.log_history for k, v in e.items() if k.endswith("/mu")]
    assert logged == pytest.approx([0.9, 0.7, 0.5, 0.3])


def authors_mu(step: int, warmup: int, decay: int, peak: float, valley: float) -> float:
    """The schedule of the authors' code (Trinity-RFT, `mix_chord`), which counts in steps."""
    if step < warmup:
        return step / warmup * peak
    if step >= warmup + decay:
        return valley
    return (peak - valley) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / decay)) + valley


@pytest.mark.parametrize(
    ("options", "authors"),
    [
        ({}, (0, 200, 0.9, 0.05)),  # their CHORD-mu
        ({"mu": 0.1, "mu_end": 0.1}, (0, 1, 0.1, 0.1)),  # their CHORD-phi
        ({"warmup": 200, "decay": 400, "mu": 0.5, "mu_end": 0.02}, (200, 400, 0.5, 0.02)),  # their example file
        ({"warmup": 0.25, "decay": 0.5}, (250, 500, 0.9, 0.05)),  # shares of a run of 1,000 steps
    ],
)
def test_mu_follows_the_schedule_of_the_authors(
    options: dict[str, float], authors: tuple[int, int, float, float]
) -> None:
    plugin = Chord(**options)  # type: ignore[arg-type]
    plugin.max_steps = 1000
    for step in range(0, 1001, 10):
        assert plugin.mu_at(step) == pytest.approx(authors_mu(step, *authors), abs=1e-12), step


def test_a_run_that_ends_before_the_decay_does_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for options, warned in (("", True), ("decay=1", False), ("mu_end=null", False)):
        caplog.clear()
        grpo(tmp_path, [f"chord:{options}"], max_steps=1).train()
        said = [r.getMessage() for r in caplog.records if "chord: mu reaches" in r.getMessage()]
        assert len(said) == warned, options
        assert not warned or "mu_end=0.05 after 200 steps, but the run has 1 steps and ends at mu=0.9" in said[0]


def test_with_chord_phi_the_tokens_of_the_stream_are_weighed_by_p_times_one_minus_p(tmp_path: Path) -> None:
    """The objective acts on the stream's gradient, and CHORD mixes that one."""
    pytest.importorskip("trl_ext_objectives", reason="chord-phi is an objective of its own")
    data, seen, after = demonstrations(5), Recorder(), Late()
    plugins = ["chord-phi", Chord(batch_size=5, mu=0.25, mu_end=0.25), after]
    trainer = grpo(tmp_path, plugins, recorder=seen, stream=data, max_steps=1)
    trainer.train()
    model, tokenizer = model_at(seen.weights[0]), tiny_tokenizer()
    logps = torch.cat(
        [
            token_log_probs(model, r["prompt"], tokenizer(r["completion"])["input_ids"] + [tokenizer.eos_token_id])
            for r in data
        ]
    )
    p = logps.detach().exp()
    loss = -(p * (1 - p) * logps).mean()
    # TRL's head gives log-probabilities in fp32, and so the weights.
    assert largest_difference(seen.sft[0], gradient(model, loss)) < 1e-8
    mixed = [0.75 * rl + 0.25 * sft for rl, sft in zip(seen.rl[0], seen.sft[0], strict=True)]
    assert largest_difference(after.rl[0], mixed) < EXACT
    logged = trainer.state.log_history[0]
    assert logged["chord/sft_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert logged["chord/sft_nll"] == pytest.approx(float(-logps.mean()), rel=1e-5)
