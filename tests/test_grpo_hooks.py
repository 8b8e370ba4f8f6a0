"""GRPO's hooks: a policy loss that is TRL's own trains as TRL; advantages of both shapes; what is refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import Plugin, assert_close, assert_equal_bits, ending_model
from torch import Tensor

from trl_ext import hookimpl
from trl_ext.errors import ConfigurationError, PluginError
from trl_ext.records import PolicyTokens, Rewards, Rollouts
from trl_ext.testing.runs import additions, logged, lora, make_grpo, moved, parameters, varied_reward

LOW, HIGH = 0.2, 0.3
# Plain SGD, so that what differs stays of the size of fp32's rounding; several steps from one generation, so that
# ratios leave the clipping range.
BASE = {
    "optim": "sgd",
    "learning_rate": 0.5,
    "max_grad_norm": 0,
    "epsilon": LOW,
    "epsilon_high": HIGH,
    "steps_per_generation": 2,
    "num_iterations": 2,
    "max_steps": 6,
}
# Sums in fp32 in another order, over six steps at a rate of 0.5; adapters' weights reach 10, where the last place of an
# fp32 number is 1e-6.
ROUNDING = {"rtol": 1e-6, "atol": 5e-6}


@dataclass(eq=False)
class Clipped(Plugin):
    """PPO's clipped term, written out from its definition (arXiv 1707.06347, equation 7)."""

    tokens: list[PolicyTokens] = field(default_factory=list)

    @hookimpl
    def policy_loss(self, tokens):
        self.tokens.append(tokens)
        ratio = (tokens.log_probs - tokens.old_log_probs).exp()
        clipped = ratio.clamp(1 - LOW, 1 + HIGH)
        return torch.maximum(-ratio * tokens.advantages, -clipped * tokens.advantages)


CASES: dict[str, dict[str, Any]] = {
    **{loss: {"loss_type": loss} for loss in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")},
    "grpo with kl": {"loss_type": "grpo", "beta": 0.1},
    "dapo with kl": {"loss_type": "dapo", "beta": 0.1},
    "luspo with kl": {"loss_type": "luspo", "beta": 0.1},
    "entropy bonus": {"loss_type": "dapo", "entropy_coef": 0.05},
    "entropy bonus and kl": {"loss_type": "grpo", "entropy_coef": 0.05, "beta": 0.1},
    "truncated completions masked": {"loss_type": "dapo", "mask_truncated_completions": True},
    "accumulation": {"loss_type": "dapo", "gradient_accumulation_steps": 2, "max_steps": 4},
    "more generation than accumulation": {
        "loss_type": "dapo",
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "max_steps": 4,
    },
    "on policy": {"loss_type": "dapo", "steps_per_generation": 1, "num_iterations": 1},
    "high-entropy tokens only": {"loss_type": "dapo", "top_entropy_quantile": 0.5},
    "temperature": {"loss_type": "dapo", "temperature": 0.7},
    "lora": {"loss_type": "grpo", "peft": True, "beta": 0.1},
}


def build(folder: Any, case: dict[str, Any], **more: Any) -> Any:
    config = {**BASE, **case, **more}
    trainer = {"peft_config": lora()} if config.pop("peft", False) else {}
    return make_grpo(folder / "run", model=ending_model(), trainer=trainer, **config)


@pytest.mark.parametrize("case", CASES)
def test_trls_own_term_as_a_plugin_trains_as_trl(tmp_path, case):
    plain = build(tmp_path / "plain", CASES[case], plain=True)
    start = parameters(plain)
    plain.train()
    plugin = Clipped()
    ours = build(tmp_path / "ours", CASES[case], plugins=[plugin])
    ours.train()
    assert moved(plain, start) > 200 * ROUNDING["atol"]
    assert_close(parameters(ours), parameters(plain), **ROUNDING)
    mine, theirs = logged(ours), logged(plain)
    for a, b in zip(mine, theirs, strict=True):
        expected = {k for k in b if "clip_ratio" not in k}
        assert expected <= set(a)
        for key in expected:
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=5e-5), key  # some are fp32 sums near 0
        assert not any("clip_ratio" in key for key in a)


def test_the_runs_above_clip_and_end_early(tmp_path):
    """Guards the comparisons: ratios outside of the range, completions of several lengths."""
    plugin = Clipped()
    build(tmp_path, CASES["dapo"], plugins=[plugin]).train()
    ratios = torch.cat([(t.log_probs - t.old_log_probs).exp()[t.mask].detach() for t in plugin.tokens])
    assert (ratios < 1 - LOW).any() or (ratios > 1 + HIGH).any()
    assert len({int(n) for t in plugin.tokens for n in t.mask.sum(1)}) > 1


def test_what_the_policy_hook_receives(tmp_path):
    plugin = Clipped()
    trainer = build(tmp_path, {"beta": 0.1, "max_steps": 4}, plugins=[plugin], temperature=0.7)
    trainer.train()
    on_policy, off_policy = plugin.tokens[0], plugin.tokens[-1]
    for t in plugin.tokens:
        assert t.log_probs.shape == t.old_log_probs.shape == t.advantages.shape == t.mask.shape == t.entropy.shape
        assert t.mask.dtype == torch.bool
        assert t.log_probs.requires_grad
        assert not t.entropy.requires_grad
        assert not t.old_log_probs.requires_grad
        assert t.reference_log_probs is not None
        assert t.training
    torch.testing.assert_close(on_policy.old_log_probs, on_policy.log_probs.detach())
    assert not torch.allclose(off_policy.old_log_probs, off_policy.log_probs.detach())
    assert [t.progress for t in plugin.tokens] == [0, 0.25, 0.5, 0.75]


def test_a_policy_loss_is_seen_in_evaluation_too(tmp_path):
    plugin = Clipped()
    data = {"eval_dataset": additions(4, "prompt_only", seed=3)}
    plain = make_grpo(tmp_path / "a" / "run", plain=True, trainer=data)
    ours = make_grpo(tmp_path / "b" / "run", plugins=[plugin], trainer=data)
    torch.manual_seed(1)
    expected = plain.evaluate()["eval_loss"]
    torch.manual_seed(1)
    assert ours.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-6)
    assert plugin.tokens
    assert not plugin.tokens[0].training


# -- advantages ------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Advantages(Plugin):
    """Scales advantages, and spreads them over the tokens on request."""

    spread: bool = False
    factor: float = 1.0
    seen: list[tuple[Rollouts, Rewards, Tensor]] = field(default_factory=list)

    @hookimpl
    def advantages(self, rollouts, rewards, advantages):
        self.seen.append((rollouts, rewards, advantages.clone()))
        advantages = self.factor * advantages
        return advantages.unsqueeze(1).expand(rollouts.mask.shape).contiguous() if self.spread else advantages


@pytest.mark.parametrize("spread", [False, True], ids=["per sequence", "per token"])
@pytest.mark.parametrize("loss", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"])
def test_unchanged_advantages_change_nothing(tmp_path, loss, spread):
    case = {"loss_type": loss, "max_steps": 3} | ({"epsilon_high": 2.0} if loss == "cispo" else {})
    plain = build(tmp_path / "plain", case, plain=True)
    start = parameters(plain)
    plain.train()
    ours = build(tmp_path / "ours", case, plugins=[Advantages(spread)])
    ours.train()
    assert moved(plain, start) > 1e-4
    if spread:
        assert_close(parameters(ours), parameters(plain), **ROUNDING)
    else:
        assert_equal_bits(parameters(ours), parameters(plain))
        assert logged(ours) == logged(plain)


def test_advantages_are_the_ones_that_train(tmp_path):
    """Twice the advantages are twice the gradient: with SGD and no clipping of the ratio, twice the first step."""
    changes = []
    for factor in (1.0, 2.0):
        case = {"max_steps": 1, "num_iterations": 1, "steps_per_generation": 1}
        trainer = build(tmp_path / str(factor), case, plugins=[Advantages(factor=factor)])
        start = parameters(trainer)
        trainer.train()
        changes.append({name: p - start[name] for name, p in parameters(trainer).items()})
    for name, change in changes[0].items():
        torch.testing.assert_close(changes[1][name], 2 * change, rtol=0, atol=1e-6)


def test_what_the_advantages_hook_receives(tmp_path):
    plugin = Advantages()
    rewards_given: list[list[float]] = []

    def length(completions: list[str], **columns: Any) -> list[float]:
        rewards_given.append(varied_reward(completions))
        return rewards_given[-1]

    def nothing(completions: list[str], **columns: Any) -> list[None]:
        return [None] * len(completions)

    trainer = make_grpo(
        tmp_path / "run",
        plugins=[plugin],
        reward=[length, nothing],
        reward_weights=[2.0, 1.0],
        steps_per_generation=2,
        num_iterations=2,
        max_steps=4,
        scale_rewards="none",
    )
    trainer.train()
    assert len(plugin.seen) == 1  # one generation serves four steps
    ((rollouts, rewards, advantages),) = plugin.seen
    n = 8
    assert len(rollouts.prompts) == len(rollouts.completions) == len(rollouts.inputs) == n
    assert rollouts.completion_ids.shape == rollouts.mask.shape
    assert rollouts.mask.shape[0] == n
    assert rollouts.num_generations == 2
    assert rollouts.training
    assert rollouts.step == 0
    assert all(a == b for a, b in zip(rollouts.prompts[::2], rollouts.prompts[1::2], strict=True))
    assert rewards.names == ("length", "nothing")
    assert rewards.per_function.shape == (n, 2)
    assert rewards.per_function[:, 0].tolist() == pytest.approx(rewards_given[0])
    assert rewards.per_function[:, 1].isnan().all()
    assert rewards.local == slice(0, n)
    assert rewards.total.tolist() == pytest.approx([2 * r for r in rewards_given[0]])
    pairs = rewards.total.view(-1, 2)
    torch.testing.assert_close(advantages, (pairs - pairs.mean(1, keepdim=True)).flatten())
    assert rollouts.old_log_probs is not None
    assert rollouts.old_log_probs.shape == rollouts.mask.shape


@pytest.mark.parametrize(
    ("shape", "got"), [((3,), r"\(3,\)"), ((4, 2), r"\(4, 2\)"), (None, "NoneType")], ids=["rows", "tokens", "none"]
)
def test_advantages_of_another_shape_are_refused(tmp_path, shape, got):
    @dataclass(eq=False)
    class Odd(Plugin):
        @hookimpl
        def advantages(self):
            return None if shape is None else torch.zeros(shape)

    trainer = make_grpo(tmp_path / "run", plugins=[Odd()])
    with pytest.raises(PluginError, match=rf"'Odd'.*hook 'advantages' at step 1: TypeError: returned {got}; expected"):
        trainer.train()


# -- refused settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold .*'Clipped'"),
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy=True .*'Clipped'"),
        ({"loss_type": "cispo", "epsilon_high": 0.5}, "loss_type='cispo' with epsilon_high=0.5 .*'Clipped'"),
    ],
    ids=["off-policy mask", "adaptive entropy", "cispo"],
)
def test_settings_that_a_policy_loss_cannot_have_are_refused(tmp_path, config, message):
    with pytest.raises(ConfigurationError, match=message):
        make_grpo(tmp_path / "run", plugins=[Clipped()], **config)


def test_a_policy_loss_of_another_shape_is_refused(tmp_path):
    @dataclass(eq=False)
    class Mean(Plugin):
        @hookimpl
        def policy_loss(self, tokens):
            return tokens.log_probs.mean()

    trainer = make_grpo(tmp_path / "run", plugins=[Mean()])
    with pytest.raises(PluginError, match=r"'Mean'.*hook 'policy_loss' at step 1: TypeError: returned \(\); expected"):
        trainer.train()


def test_a_policy_loss_may_be_infinite_where_nothing_is_asked(tmp_path):
    @dataclass(eq=False)
    class Infinite(Plugin):
        @hookimpl
        def policy_loss(self, tokens):
            return torch.where(tokens.mask, -tokens.log_probs * tokens.advantages, torch.inf)

    trainer = build(tmp_path, {"max_steps": 2}, plugins=[Infinite()])
    trainer.train()
    assert all(p.isfinite().all() for p in parameters(trainer).values())


def test_the_record_holds_what_full_logits_give_at_the_temperature(tmp_path):
    plugin = Clipped()
    trainer = build(tmp_path, {"max_steps": 1, "learning_rate": 0.0}, plugins=[plugin], temperature=0.7)
    batches: list[dict[str, Tensor]] = []
    original = trainer._compute_loss

    def noting(model: Any, inputs: dict[str, Any]) -> Any:
        batches.append(inputs)
        return original(model, inputs)

    trainer._compute_loss = noting
    trainer.train()
    (batch,), (tokens,) = batches, plugin.tokens
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    width = batch["completion_ids"].shape[1]
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, -width - 1 : -1].double() / 0.7
    log_probs = logits.log_softmax(-1)
    picked = log_probs.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    on = tokens.mask
    torch.testing.assert_close(tokens.log_probs[on].double(), picked[on], rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens.entropy[on].double(), entropy[on], rtol=0, atol=1e-5)
