"""Parallel averaging against two branches stepped apart by plain optimisers, and against plain TRL at both ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from branches import OPTIMIZERS, SCHEDULE, Branch, largest_difference, two_branches
from mixing_runs import SETTINGS, Recorder, Vector, demonstrations, grpo
from oracles import combine
from trl_ext_mixing import ParallelAveraging

from trl_ext.testing import tiny_llama, tiny_tokenizer


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_twenty_steps_are_the_mean_of_two_separate_branches_to_the_last_bit(
    tmp_path: Path, optim: str, accumulation: int
) -> None:
    seen = Recorder()
    trainer = grpo(
        tmp_path,
        [ParallelAveraging(batch_size=3)],
        recorder=seen,
        optim=optim,
        max_steps=20,
        gradient_accumulation_steps=accumulation,
        **SCHEDULE,
        max_grad_norm=0.2,
    )
    trainer.train()
    expected = two_branches(optim, seen, 20, (1e-2, 1e-2), (0.2, 0.2))
    assert len(seen.weights) == 21
    assert largest_difference(seen.weights[0], seen.weights[-1]) > 1e-3, "the run did not move"
    for step, (mine, theirs) in enumerate(zip(seen.weights, expected, strict=True)):
        assert largest_difference(mine, theirs) == 0, f"step {step}"


def test_fp32_agrees_with_the_branches_and_rates_clipping_and_coefficient_are_apart(tmp_path: Path) -> None:
    seen = Recorder()
    trainer = grpo(
        tmp_path,
        [ParallelAveraging(lr_ratio=0.25, max_grad_norm=0.05, coefficient=0.3)],
        recorder=seen,
        dtype=torch.float32,
        max_steps=20,
        **SCHEDULE,
        max_grad_norm=0.4,
        optim="adamw_torch",
    )
    trainer.train()
    expected = two_branches("adamw_torch", seen, 20, (1e-2, 2.5e-3), (0.4, 0.05), c=0.3)
    # Rounding of the weighted mean only: three operations a step here and three there, each off by 2^-24 of a weight.
    largest = max(float(t.abs().max()) for step in seen.weights for t in step)
    assert largest_difference(seen.weights[-1], expected[-1]) < 20 * 6 * 2**-24 * largest


def test_it_is_not_one_optimizer_on_the_mean_gradient(tmp_path: Path) -> None:
    """With the SFT gradient 30 times larger, Adam on the mean gradient goes elsewhere: the modes must differ."""
    runs = {}
    for mode in ("updates", "gradients"):
        seen = Recorder()
        grpo(tmp_path / mode, [ParallelAveraging(mode=mode)], recorder=seen, max_grad_norm=0.0).train()
        runs[mode] = seen
    assert largest_difference(runs["updates"].weights[-1], runs["gradients"].weights[-1]) > 1e-3


def test_gradient_mode_is_one_plain_optimizer_on_the_mean_of_the_clipped_gradients(tmp_path: Path) -> None:
    seen = Recorder()
    grpo(
        tmp_path,
        [ParallelAveraging(mode="gradients", max_grad_norm=0.05)],
        recorder=seen,
        max_grad_norm=0.1,
        optim="adamw_torch",
        **SCHEDULE,
    ).train()
    theta = seen.weights[0]
    one = Branch("adamw_torch", theta, 1e-2, 4, max_norm=0.1)
    for g_rl, g_sft in zip(seen.rl, seen.sft, strict=True):
        mean = [(a + b) / 2 for a, b in zip(clipped(g_rl, 0.1), clipped(g_sft, 0.05), strict=True)]
        theta = one.step(theta, mean)
    # The same operations up to their order, in fp64.
    assert largest_difference(theta, seen.weights[-1]) < 1e-12


def clipped(gradient: Vector, max_norm: float) -> Vector:
    norm = torch.sqrt(sum((g * g).sum() for g in gradient))
    return [g * min(1.0, float(max_norm / (norm + 1e-6))) for g in gradient]


def test_coefficient_zero_is_plain_grpo(tmp_path: Path) -> None:
    seen = Recorder()
    mixed = grpo(tmp_path / "mixed", [ParallelAveraging(coefficient=0)], recorder=seen)
    mixed.train()
    plain = grpo(tmp_path / "plain", [], make=trl.GRPOTrainer, config=trl.GRPOConfig)
    plain.train()
    assert largest_difference(seen.weights[0], seen.weights[-1]) > 1e-3
    assert largest_difference([p.detach() for p in plain.model.parameters()], seen.weights[-1]) == 0


def test_coefficient_one_is_plain_sft(tmp_path: Path) -> None:
    """A stream of one batch, cycled, is a plain SFT run on that batch, so the order of rows does not matter."""
    data = demonstrations(6)
    seen = Recorder()
    grpo(tmp_path / "mixed", [ParallelAveraging(coefficient=1, batch_size=6)], recorder=seen, stream=data).train()
    settings = {k: v for k, v in SETTINGS.items() if k not in ("num_generations", "max_completion_length")}
    plain = trl.SFTTrainer(
        tiny_llama(hidden=16).double(),
        args=trl.SFTConfig(str(tmp_path / "plain"), **{**settings, "per_device_train_batch_size": 6}),
        train_dataset=data,
        processing_class=tiny_tokenizer(),
    )
    plain.train()
    # Rows come in another order, so sums of the head's fp32 log-probabilities round differently.
    assert largest_difference([p.detach() for p in plain.model.parameters()], seen.weights[-1]) < 1e-6


@pytest.mark.parametrize("mode", ["updates", "gradients"])
def test_the_rl_half_does_not_change_with_the_number_of_sft_tokens(tmp_path: Path, mode: Any) -> None:
    """With SGD a step is (1 - c) and c times what each half moves by, so two values of c give the RL half alone."""
    halves, sft = {}, {}
    for size in (1, 12):
        moved = {}
        for c in (0.25, 0.5):
            seen = Recorder()
            plugin = ParallelAveraging(batch_size=size, coefficient=c, mode=mode)
            folder = tmp_path / f"{size}-{c}"
            grpo(folder, [plugin], recorder=seen, max_steps=1, optim="sgd", max_grad_norm=0.0).train()
            moved[c] = combine(seen.weights[1], seen.weights[0], 1.0, -1.0)
        halves[size] = combine(moved[0.25], moved[0.5], 2.0, -1.0)  # 2 (3/4 r + 1/4 s) - (1/2 r + 1/2 s) = r
        sft[size] = combine(moved[0.5], halves[size], 2.0, -1.0)
    assert largest_difference(halves[1], halves[12]) < 1e-14  # rounding of weights below 4 in fp64
    assert max(float(t.abs().max()) for t in halves[1]) > 1e-4
    assert largest_difference(sft[1], sft[12]) > 1e-4
