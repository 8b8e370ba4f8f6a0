"""RLOO's hooks: advantages per completion, and a policy term per token in place of that of whole completions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import Plugin, assert_close, ending_model

from trl_ext import hookimpl
from trl_ext.errors import PluginError
from trl_ext.testing.runs import MAKE, additions, moved, parameters, start_model, varied_reward

make_rloo = MAKE["rloo"]
# Plain SGD: what differs by rounding stays of the size of rounding.
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0, "max_steps": 4}
ROUNDING = {"rtol": 0, "atol": 1e-6}  # four steps of 0.1 times the rounding in fp32 of gradients of size 1, times 4


@dataclass(eq=False)
class ClippedAsTrl(Plugin):
    """TRL's clipped term of whole completions, given to each completion's first token."""

    epsilon: float = 0.2

    @hookimpl
    def policy_loss(self, tokens):
        mask = tokens.mask.float()
        ratio = ((tokens.log_probs - tokens.old_log_probs) * mask).sum(1).exp()
        advantages = tokens.advantages[:, 0]
        clipped = ratio.clamp(1 - self.epsilon, 1 + self.epsilon)
        loss = -torch.min(ratio * advantages, clipped * advantages)
        first = torch.zeros_like(tokens.log_probs)
        first[:, 0] = 1
        return first * loss.unsqueeze(1)


CASES: dict[str, dict[str, Any]] = {
    "on policy": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    # Old log-probabilities are those of earlier weights, and ratios are clipped.
    "two iterations": {"num_iterations": 2, "steps_per_generation": 2, "epsilon": 0.01},
    "no KL": {"beta": 0.0},
    "normalised": {"normalize_advantages": True},
}


@pytest.mark.parametrize("case", CASES)
def test_a_plugin_with_trl_s_own_term_trains_as_trl(tmp_path, case):
    config = {**SGD, **CASES[case]}
    runs = []
    for name, ours in (("plain", {"plain": True}), ("ours", {"plugins": [ClippedAsTrl(config.get("epsilon", 0.2))]})):
        trainer = make_rloo(tmp_path / name / "run", model=ending_model(), **ours, **config)
        start = parameters(trainer)
        trainer.train()
        assert moved(trainer, start) > 1e-3
        runs.append(trainer)
    assert_close(parameters(runs[1]), parameters(runs[0]), **ROUNDING)
    if case == "two iterations":
        assert any(entry.get("clip_ratio/region_mean", 0) > 0 for entry in runs[0].state.log_history)
    assert not any("clip_ratio" in key for entry in runs[1].state.log_history for key in entry)


@dataclass(eq=False)
class Sees(Plugin):
    seen: list[Any] = field(default_factory=list)

    @hookimpl
    def advantages(self, rollouts, rewards, advantages):
        self.seen.append((rollouts, rewards, advantages.clone()))
        return 3 * advantages + 1

    @hookimpl
    def policy_loss(self, tokens):
        self.seen.append(tokens)
        return -tokens.log_probs * tokens.advantages


def test_advantages_are_those_of_the_leave_one_out_baseline_and_reach_the_loss(tmp_path):
    plugin = Sees()
    trainer = make_rloo(tmp_path / "run", plugins=[plugin], num_generations=4, beta=0.0, max_steps=1)
    trainer.train()
    (rollouts, rewards, advantages), tokens = plugin.seen
    own = torch.tensor(varied_reward(rollouts.completions)).view(-1, 4)
    torch.testing.assert_close(rewards.total.view(-1, 4), own)
    others = (own.sum(1, keepdim=True) - own) / 3
    torch.testing.assert_close(advantages.view(-1, 4), own - others)
    assert rollouts.old_log_probs.shape == rollouts.completion_ids.shape == tokens.log_probs.shape
    given, reached = (3 * advantages + 1).sort().values, tokens.advantages[:, 0].sort().values
    torch.testing.assert_close(reached, given)  # TRL shuffles the rows
    torch.testing.assert_close(tokens.old_log_probs, tokens.log_probs.detach())  # nothing was trained in between
    assert tokens.reference_log_probs is None
    shown = torch.tensor(list(trainer._logs["advantages"]))
    torch.testing.assert_close(shown, 3 * advantages + 1)


def test_the_reference_of_the_kl_term_reaches_the_policy_loss(tmp_path):
    """In the second step, when the weights have moved: full logits of the start model."""
    plugin = Sees()
    make_rloo(tmp_path / "run", plugins=[plugin], beta=0.1, max_steps=2).train()
    (rollouts, _, _), tokens = plugin.seen[2:]
    ids = torch.cat([rollouts.prompt_ids, rollouts.completion_ids], dim=1)
    attended = torch.cat([rollouts.prompt_mask, rollouts.mask], dim=1)
    with torch.no_grad():
        logits = start_model("rloo")(input_ids=ids, attention_mask=attended).logits
    labels = rollouts.completion_ids.unsqueeze(2)
    expected = logits[:, -labels.size(1) - 1 : -1].log_softmax(-1).gather(2, labels).squeeze(2)
    reached = (tokens.reference_log_probs * tokens.mask).sum(1).sort().values  # TRL shuffles the rows
    torch.testing.assert_close(reached, (expected * rollouts.mask).sum(1).sort().values)
    assert not torch.allclose(tokens.reference_log_probs, tokens.log_probs, atol=1e-3)


@dataclass(eq=False)
class PerToken(Plugin):
    @hookimpl
    def advantages(self, rollouts, advantages):
        return advantages.unsqueeze(1).expand(rollouts.mask.shape)


def test_advantages_per_token_are_refused(tmp_path):
    trainer = make_rloo(tmp_path / "run", plugins=[PerToken()])
    with pytest.raises(PluginError, match=r"'advantages' at step 1: .* expected advantages of shape \(4,\)$"):
        trainer.train()


def test_a_reward_that_is_not_finite_stops_the_run(tmp_path):
    def infinite(completions, **columns):
        return [float("inf")] * len(completions)

    trainer = make_rloo(tmp_path / "run", plugins=[Sees()], reward=infinite, train=additions(8, "prompt_only"))
    with pytest.raises(Exception, match="reward function 'infinite' gave a reward that is NaN or infinite"):
        trainer.train()
