"""ReLIFT against its formula, with gradients taken here on full logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from branches import largest_difference
from mixing_runs import (
    Late,
    Rolled,
    demonstrations,
    grpo,
    mixed_reward,
    never,
)
from oracles import combine, demonstration_nll, fp32_error, gradient, model_at
from trl_ext_mixing import ReLIFT

from trl_ext import hookimpl
from trl_ext.errors import PluginError
from trl_ext.testing import tiny_llama


def test_relift_steps_on_the_unsolved_prompts_when_the_buffer_is_full(tmp_path: Path) -> None:
    rolled, seen = Rolled(), Late()
    trainer = grpo(
        tmp_path,
        [rolled, ReLIFT(buffer_size=3, batch_size=1, lr_ratio=0.5), seen],
        stream=False,
        data=demonstrations(16),
        reward=mixed_reward,
        optim="sgd",
        max_grad_norm=0.0,
        per_device_train_batch_size=8,
        max_steps=6,
    )
    trainer.train()
    buffered: list[Any] = []
    steps = solved = 0
    for step, (rollouts, rewards, _) in enumerate(rolled.batches):
        for i in range(0, len(rollouts.inputs), 4):
            unsolved = not bool(rewards.total[i : i + 4].any())
            buffered += [rollouts.inputs[i]] * unsolved
            solved += not unsolved
        expected, bound = combine(seen.weights[step], seen.rl[step], 1.0, -1e-2), 1e-14  # fp64, weights below 4
        if len(buffered) >= 3:
            model = model_at(expected)
            sft = gradient(model, demonstration_nll(model, buffered[:3]))
            expected = combine(expected, sft, 1.0, -5e-3)
            buffered, steps = buffered[3:], steps + 1
            bound = 5e-3 * fp32_error(sft)  # Llama's norms work in fp32, where the last bit of the weights shows
        assert largest_difference(seen.weights[step + 1], expected) < bound, step
    assert solved > 0
    assert steps > 1
    assert trainer.state.log_history[-2]["relift/sft_steps"] == steps


def test_relift_clips_its_step_and_leaves_evaluation_and_skipped_steps_alone(tmp_path: Path) -> None:
    class Break:
        """Makes the RL gradient of the second step infinite."""

        requires_api, citation, steps = "1", "test", 0

        @hookimpl
        def gradients_ready(self, gradients: Any, streams: Any) -> None:
            self.steps += 1
            if self.steps == 2:
                gradients.mul_(torch.inf)

    rolled, seen = Rolled(), Late()
    trainer = grpo(
        tmp_path,
        [rolled, ReLIFT(buffer_size=1, max_grad_norm=0.1), Break(), seen],
        stream=False,
        data=demonstrations(16),
        eval_data=demonstrations(4),
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        reward=never,
        optim="sgd",
        max_grad_norm=0.0,
        max_steps=3,
        nonfinite="skip",
    )
    trainer.train()
    batches = [rollouts for rollouts, _, _ in rolled.batches if rollouts.training]
    assert len(rolled.batches) > len(batches) == 3
    waiting: list[Any] = []
    for step, rollouts in enumerate(batches):
        waiting.append(rollouts.inputs[0])
        expected = seen.weights[step]
        if step != 1:
            expected = combine(expected, seen.rl[step], 1.0, -1e-2)
            # One step of SFT after each, so that of the two prompts of the skipped step and the next one is left over.
            model = model_at(expected)
            sft = gradient(model, demonstration_nll(model, [waiting.pop(0)]))
            norm = float(torch.sqrt(sum((g * g).sum() for g in sft)))
            assert norm > 0.1
            expected = combine(expected, sft, 1.0, -1e-2 * 0.1 / (norm + 1e-6))
        assert largest_difference(seen.weights[step + 1], expected) < 1e-9, step
    assert [e["relift/buffered"] for e in trainer.state.log_history if "loss" in e][-1] == len(waiting) == 1


def test_a_non_finite_gradient_of_the_buffer_is_left_out_or_stops_the_run(tmp_path: Path) -> None:
    def poisoned() -> Any:
        model = tiny_llama(hidden=16).double()

        def spoil(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            # Only `Demonstrations` asks for plain logits without a cache.
            if kwargs.get("use_cache") is False and not kwargs.get("fused_lm_head"):
                output.logits = output.logits * torch.inf
            return output

        model.register_forward_hook(spoil, with_kwargs=True)
        return model

    given: dict[str, Any] = {"stream": False, "data": demonstrations(16), "reward": never, "max_steps": 3}
    trainer = grpo(tmp_path, ["relift:buffer_size=1"], model=poisoned(), nonfinite="skip", **given)
    trainer.train()
    last = trainer.state.log_history[-2]
    assert (last["relift/sft_steps"], last["relift/skipped_sft_steps"]) == (0, 3)
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())
    with pytest.raises(PluginError, match=r"relift.*nonfinite='skip' leaves such steps out"):
        grpo(tmp_path, ["relift:buffer_size=1"], model=poisoned(), **given).train()


def test_relift_keeps_its_buffer_over_a_resume(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "reward": never}

    def run(**more: Any) -> tuple[Any, Late]:
        seen = Late()
        plugins = ["relift:buffer_size=5", seen]
        return grpo(tmp_path, plugins, stream=False, data=demonstrations(16), **settings), seen

    whole, seen_whole = run()
    whole.train()
    resumed, seen = run()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert largest_difference(seen_whole.weights[-1], seen.weights[-1]) == 0
    assert resumed.state.log_history[-2]["relift/sft_steps"] == 1
