"""HPT against its formula, with gradients taken here on full logits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from branches import largest_difference
from mixing_runs import (
    Recorder,
    Rolled,
    demonstrations,
    grpo,
    mixed_reward,
    prompts,
    stopping_model,
)
from oracles import combine, completions, demonstration_nll, gradient, model_at, rl_gradient
from trl_ext_mixing import HPT

from trl_ext.records import MicroStep


@pytest.mark.parametrize(("loss_type", "gamma", "accumulation"), [("dapo", 0, 1), ("dapo", 0.25, 2), ("grpo", 0.25, 1)])
def test_hpt_gives_each_prompt_one_of_two_losses_each_a_mean_of_its_own(
    tmp_path: Path, loss_type: str, gamma: float, accumulation: int
) -> None:
    rolled, seen = Rolled(), Recorder()
    trainer = grpo(
        tmp_path,
        [rolled, HPT(sft_coefficient=0.7, gamma=gamma)],
        recorder=seen,
        stream=False,
        data=demonstrations(16),
        model=stopping_model(),
        reward=mixed_reward,
        loss_type=loss_type,
        max_completion_length=8,
        per_device_train_batch_size=16 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=4,
    )
    trainer.train()
    mixed, lengths, at_gamma = 0, set(), 0
    for step, (rollouts, rewards, advantages) in enumerate(rolled.batches):
        rates = rewards.total.view(-1, 4).gt(0).float().mean(1)
        lengths |= set(rollouts.mask.sum(1).tolist())
        at_gamma += int((rates == 0.25).sum())
        keep = [bool(rates[i // 4] > gamma) for i in range(len(rollouts.prompts))]
        rows = [rollouts.inputs[i] for i in range(0, len(keep), 4) if not keep[i]]
        mixed += 0 < len(rows) < 4
        model = model_at(seen.weights[step])
        kept = [c for c, keeps in zip(completions(rollouts, advantages), keep, strict=True) if keeps]
        expected = rl_gradient(model, kept, per_token=loss_type == "dapo")
        if rows:
            expected = combine(expected, gradient(model, demonstration_nll(model, rows)), 1.0, 0.7)
        # TRL's advantages are fp32.
        assert largest_difference(seen.rl[step], expected) < 1e-6, step
    assert mixed, "no batch had both kinds of prompt"
    assert len(lengths) > 2, "no two denominators differ"
    assert at_gamma, "no pass rate was 1/4"


def test_hpt_with_every_prompt_solved_is_plain_grpo_and_asks_for_no_demonstration(tmp_path: Path) -> None:
    runs = []
    for i, plugins in enumerate(([HPT(solved_at=0.0)], [])):
        seen = Recorder()
        data = prompts(16).add_column("completion", [""] * 16)
        grpo(tmp_path / str(i), plugins, recorder=seen, stream=False, data=data).train()
        runs.append(seen)
    assert largest_difference(runs[0].weights[-1], runs[1].weights[-1]) == 0
    assert largest_difference(runs[0].weights[0], runs[0].weights[-1]) > 1e-3


@pytest.mark.parametrize("label_tokens", [0.0, 5.0])
def test_ranks_with_shards_make_a_forward_where_any_has_a_demonstration(label_tokens: float) -> None:
    """This one has none."""
    asked = []

    def nll_sum(demonstrations: list[object]) -> torch.Tensor:
        asked.append(demonstrations)
        return torch.zeros(())

    plugin = HPT()
    plugin.source = SimpleNamespace(context=SimpleNamespace(sharded=True, world_size=2), nll_sum=nll_sum)
    plugin._label_tokens = label_tokens
    ones = torch.ones(1, 3)
    assert plugin.auxiliary_losses(MicroStep({}, ones, ones, ones.bool(), 0, 0.0))["sft"].value == 0
    assert asked == ([[]] if label_tokens else [])
