"""`pg` and `adaptive-lr`: against autograd on full logits, and against the gradients that they scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from runs import checksum_reward, grpo
from torch import Tensor
from trl_ext_reachability.adaptive_lr import AdaptiveLr
from trl_ext_reachability.pg import PG, sequence_squared_norms

from trl_ext import hookimpl
from trl_ext.errors import ConfigurationError
from trl_ext.gradients import GradientView
from trl_ext.options import check_options
from trl_ext.records import Rewards, Rollouts, StreamGradient
from trl_ext.testing import tiny_llama


@dataclass(eq=False)
class Record:
    """Keeps the rollouts and the gradient of every step."""

    requires_api: ClassVar[str] = "1"
    citation: ClassVar[str] = "test"
    label: str = "record"

    def __post_init__(self) -> None:
        self.rollouts: list[Rollouts] = []
        self.advantages_seen: list[Tensor] = []
        self.gradients: list[Tensor] = []

    @hookimpl
    def advantages(self, rollouts: Rollouts, rewards: Rewards, advantages: Tensor) -> Tensor:
        self.rollouts.append(rollouts)
        self.advantages_seen.append(advantages.clone())
        return advantages

    @hookimpl
    def gradients_ready(self, gradients: GradientView, streams: Mapping[str, StreamGradient]) -> None:
        self.gradients.append(flat(gradients))


def flat(view: GradientView) -> Tensor:
    return torch.cat([g.flatten().clone() for g in view.tensors if g is not None])


def sequence_gradients(rollouts: Rollouts) -> list[Tensor]:
    """The gradient of each completion's log-probability under the initial model, from full logits."""
    torch.manual_seed(0)
    model = tiny_llama(hidden=16)
    found = []
    for i in range(len(rollouts.prompts)):
        prompt = rollouts.prompt_ids[i][rollouts.prompt_mask[i].bool()]
        completion = rollouts.completion_ids[i][rollouts.mask[i].bool()]
        logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        log_prob = logits.log_softmax(-1).gather(-1, completion[:, None]).sum()
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(log_prob, list(model.parameters()))]))
    return found


@pytest.mark.parametrize("options", ["", ",rewards=sign", ",baseline=group", ",adaptive=true"])
def test_update_is_the_policy_gradient(tmp_path: Path, options: str) -> None:
    """The first step's gradient is -1/N sum_i eta_i A_i grad log p(y_i|x_i), up to dr_grpo's constant length."""
    record = Record()
    trainer = grpo(
        tmp_path,
        [f"pg:threshold=0.4{options}"],
        instances=[record],
        loss_type="dr_grpo",
        max_steps=1,
        max_grad_norm=0.0,
        per_device_train_batch_size=8,
    )
    trainer.train()
    rollouts = record.rollouts[0]
    reward = torch.tensor([float(r > 0.4) for r in checksum_reward(rollouts.completions)])
    assert 0 < reward.sum() < 8
    if "sign" in options:
        reward = 2 * reward - 1
    if "baseline" in options:
        reward = reward - reward.view(2, 4).mean(1).repeat_interleave(4)
    torch.testing.assert_close(record.advantages_seen[0], reward)
    per_sequence = sequence_gradients(rollouts)
    rates = [1 / (4 + 2 * g.dot(g)) if "adaptive" in options else torch.tensor(1.0) for g in per_sequence]
    length = trainer.max_completion_length
    expected = -sum(r * a * g for r, a, g in zip(rates, reward, per_sequence, strict=True)) / 8 / length
    # Sums over some 10^4 fp32 terms in two orders.
    torch.testing.assert_close(record.gradients[0], expected, rtol=1e-3, atol=1e-6)
    if "adaptive" in options:
        logged = trainer.state.log_history[0]["pg/rate"]
        assert logged == pytest.approx(float(torch.stack(rates).mean()), rel=1e-4)


def test_norm_of_a_sequence_is_that_of_its_own_tokens() -> None:
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    unused = torch.nn.Parameter(torch.ones(1))
    log_probs = torch.stack([w[0] * torch.tensor([1.0, 2.0]), w[1] * torch.tensor([3.0, 5.0])])
    mask = torch.tensor([[True, True], [True, False]])
    assert sequence_squared_norms(log_probs, mask, [w, unused]).tolist() == [9, 9]


def test_given_advantages_stay_those_of_the_process_reward(tmp_path: Path) -> None:
    record = Record()
    process = {"name": "process-reward", "verifier": "runs:constant_verifier", "split": "token"}
    grpo(tmp_path, [process, "pg:rewards=given"], instances=[record], max_steps=1).train()
    rollouts = record.rollouts[0]
    expected = torch.tensor(checksum_reward(rollouts.completions))[:, None] * rollouts.mask
    torch.testing.assert_close(record.advantages_seen[0], expected)


def test_adaptive_lr_scales_the_step(tmp_path: Path) -> None:
    before, after = Record("before"), Record("after")
    trainer = grpo(tmp_path, instances=[before, AdaptiveLr(constant=0.5, slope=3.0), after], max_steps=2)
    trainer.train()
    for g, scaled in zip(before.gradients, after.gradients, strict=True):
        torch.testing.assert_close(scaled, g / (0.5 + 3 * g.dot(g)), rtol=1e-4, atol=1e-8)
    assert 0 < trainer.state.log_history[0]["adaptive-lr/factor"] < 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PG(rewards="dense"), "rewards='dense' is not one of binary, sign, raw, given"),  # type: ignore[arg-type]
        (lambda: PG(baseline="mean"), "baseline='mean' is not one of none, group"),  # type: ignore[arg-type]
        (lambda: PG(rewards="given", baseline="group"), "no rewards to work on"),
        (lambda: PG(rewards="raw", threshold=0.4), r"threshold=0\.4: rewards='raw' has none"),
        (lambda: AdaptiveLr(constant=0.0), r"constant=0\.0 is not > 0"),
        (lambda: AdaptiveLr(slope=-1.0), r"slope=-1\.0 is not >= 0"),
    ],
)
def test_options_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_options(make())


def test_stale_rollouts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"num_iterations=2 .* set num_iterations=1"):
        grpo(tmp_path, ["pg"], num_iterations=2)


@pytest.mark.parametrize("generation", [2, 4])
def test_generating_for_more_than_a_step_is_refused(tmp_path: Path, generation: int) -> None:
    """Micro-steps of the next optimiser step would train on what older weights drew."""
    message = rf"steps_per_generation={generation} with gradient_accumulation_steps=3 trains on rollouts of older"
    with pytest.raises(ConfigurationError, match=message):
        grpo(tmp_path, ["pg"], gradient_accumulation_steps=3, steps_per_generation=generation)
    grpo(tmp_path, ["pg"], gradient_accumulation_steps=4, steps_per_generation=2)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", [1, 0, 0, 0]),
        (":rewards=sign", [1, 0, -1, 0]),
        (":rewards=raw,baseline=group", [0.375, 0, -0.375, 0]),
    ],
)
def test_what_no_function_judged_has_no_advantage(tmp_path: Path, options: str, expected: list[float]) -> None:
    """Not even in the mean of its group; a group without any verdict is left out."""

    def silent(completions: list[str], **columns: Any) -> list[float | None]:
        return [1.0, None, 0.25, None, *[None] * 4]

    record = Record()
    settings: dict[str, Any] = {"per_device_train_batch_size": 8, "max_steps": 1}
    grpo(tmp_path, [f"pg{options}"], instances=[record], reward=silent, **settings).train()
    assert record.advantages_seen[0].tolist() == [*expected, 0, 0, 0, 0]


def test_process_rewards_are_not_thrown_away(tmp_path: Path) -> None:
    process = {"name": "process-reward", "verifier": "runs:constant_verifier"}
    for before in (process, "best-of-m"):
        for plugins in ([before, "pg"], ["pg", before]):
            with pytest.raises(ConfigurationError, match=r"Both set advantages anew, .* set pg:rewards=given"):
                grpo(tmp_path, plugins)
        grpo(tmp_path, [before, "pg:rewards=given"])
