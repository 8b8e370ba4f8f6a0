"""The methods inside of runs: next to TRL's settings, and what is refused before a model loads."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import policy_oracles as oracles
import pytest
from policy_runs import Seen, grpo
from trl_ext_policy.clip_cov import ClipCov
from trl_ext_policy.gfpo import GFPO

from trl_ext.errors import ConfigurationError
from trl_ext.testing.runs import lora


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_gfpo_ranks_the_tokens_that_the_loss_sees(tmp_path: Path, scale: str) -> None:
    """Truncated completions are masked: they have no tokens, and are not taken for the shortest."""
    seen = Seen()
    settings = {"scale_rewards": scale, "mask_truncated_completions": True, "per_device_train_batch_size": 32}
    grpo(tmp_path, [GFPO(k=3), seen], max_completion_length=8, **settings).train()
    masked = 0
    for rollouts, rewards, advantages in seen.batches:
        lengths, total = rollouts.mask.sum(dim=1).tolist(), rewards.total.tolist()
        masked += lengths.count(0)
        groups = range(0, 32, 4)
        keep = [kept for g in groups for kept in oracles.retained(total[g : g + 4], lengths[g : g + 4], 3, "length")]
        filtered = [r if kept else None for r, kept in zip(total, keep, strict=True)]
        expected = [a for g in groups for a in oracles.grpo(filtered[g : g + 4], scale, filtered)]
        # TRL's rewards are in fp32.
        assert advantages.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert 0 < masked < 32 * len(seen.batches)


@pytest.mark.parametrize("name", ["gfpo:k=2", "pkpo:k=2", "pass-at-k:k=2", "clip-cov", "kl-cov", "entropy-advantage"])
@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "grpo", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"loss_type": "bnpo", "beta": 0.05, "peft": True},
        {"loss_type": "dr_grpo", "num_iterations": 2, "scale_rewards": "none"},
        {"loss_type": "luspo", "steps_per_generation": 2, "per_device_train_batch_size": 4},
    ],
    ids=lambda settings: settings["loss_type"],
)
def test_each_trains_beside_trls_settings(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    settings = dict(settings)
    trainer = {"peft_config": lora()} if settings.pop("peft", False) else {}
    run = grpo(tmp_path, names=[name], trainer=trainer, **settings)
    run.train()
    losses = [log for log in run.state.log_history if "grad_norm" in log]
    assert len(losses) == 3
    assert any(log["grad_norm"] > 0 for log in losses)


@pytest.mark.parametrize("name", ["gfpo:k=2", "pkpo:k=2", "pass-at-k:k=2"])
@pytest.mark.parametrize("loss_type", ["cispo", "sapo", "vespo"])
def test_new_advantages_go_with_every_policy_term(tmp_path: Path, name: str, loss_type: str) -> None:
    more = {"epsilon_high": 2.0} if loss_type == "cispo" else {}
    run = grpo(tmp_path, names=[name], loss_type=loss_type, max_steps=1, **more)
    run.train()
    assert run.state.log_history[0]["grad_norm"] > 0


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gfpo", {}, "k=8, which leaves out at least one, needs 9 completions a prompt, and num_generations=4"),
        ("gfpo:k=4", {}, "set num_generations=5"),
        ("pkpo:k=5", {}, "k=5 needs 5 completions a prompt, and num_generations=4"),
        ("pass-at-k:k=5", {}, "k=5 needs 5 completions a prompt, and num_generations=4"),
        ("pkpo:k=linear:5:2", {}, "k=linear:5:2 needs 5 completions a prompt, and num_generations=4"),
        ("pkpo:k=0", {}, "0 is not >= 1"),
        ("pass-at-k:k=2.5", {}, "k=2.5 does not begin and end with whole numbers"),
        *[
            (name, {"multi_objective_aggregation": "normalize_then_sum"}, "set it to 'sum_then_normalize'")
            for name in ("gfpo:k=2", "pkpo", "pass-at-k")
        ],
        *[
            (name, {"loss_type": "sapo"}, "loss_type='sapo' has a policy term of its own")
            for name in ("clip-cov", "kl-cov", "entropy-advantage")
        ],
        *[
            (name, {"importance_sampling_level": "sequence"}, "set it to 'token'")
            for name in ("clip-cov", "kl-cov", "entropy-advantage")
        ],
        *[
            (name, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, "covariance with it is 0")
            for name in ("clip-cov", "kl-cov")
        ],
        ("clip-cov:low=6", {}, "low=6.0 is not below high=5.0"),
        ("kl-cov", {"delta": 2.0}, "delta=2.0 bounds a ratio that kl-cov does not clip"),
        ("entropy-advantage:kappa=1", {}, "kappa=1.0 is not > 1"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        grpo(tmp_path, names=[name], **settings)
    assert message in str(refusal.value)


def test_advice_of_a_refusal_works(tmp_path: Path) -> None:
    grpo(tmp_path, names=["gfpo:k=4"], num_generations=5, per_device_train_batch_size=5)


@pytest.mark.parametrize("pair", [("gfpo:k=2", "pkpo"), ("pass-at-k", "best-of-m"), ("pg", "gfpo:k=2")])
def test_two_that_set_advantages_anew_exclude_each_other(tmp_path: Path, pair: tuple[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="Both set advantages anew"):
        grpo(tmp_path, names=list(pair))


def test_a_penalty_without_effect_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="trl_ext_policy.kl_cov"):
        grpo(tmp_path / "twice", names=["kl-cov"], num_iterations=2)
        grpo(tmp_path / "split", names=["kl-cov"], steps_per_generation=2, per_device_train_batch_size=4)
        assert not caplog.records
        grpo(tmp_path / "once", names=["kl-cov"])
    assert "each rollout is used for one update" in caplog.text


def test_the_share_of_chosen_tokens_is_logged(tmp_path: Path) -> None:
    run = grpo(tmp_path, [ClipCov(share=0.25, low=-100.0, high=100.0)])
    run.train()
    logged = [log["clip-cov/chosen"] for log in run.state.log_history if "clip-cov/chosen" in log]
    assert len(logged) == 3
    assert all(0.2 < share <= 0.25 for share in logged)  # whole tokens of some 48
