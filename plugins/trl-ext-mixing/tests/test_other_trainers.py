"""SFT beside RLOO, DPO, KTO and distillation: the same sums, and no option about rewards that nobody gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mixing_runs import constant_reward
from torch import Tensor

from trl_ext.errors import ConfigurationError
from trl_ext.testing.runs import MAKE, additions, parameters, rows

SGD: dict[str, Any] = {
    "optim": "sgd",
    "learning_rate": 0.1,
    "max_grad_norm": 0,
    "max_steps": 1,
    "per_device_train_batch_size": 8,
}


def one_step(folder: Path, kind: str, **options: Any) -> dict[str, Tensor]:
    trainer = MAKE[kind](folder / "run", **SGD, **options)
    trainer.train()
    return parameters(trainer)


@pytest.mark.parametrize("kind", ["dpo", "kto", "distillation"])
def test_chord_steps_along_the_weighted_sum_of_trl_s_own_two_steps(tmp_path: Path, kind: str) -> None:
    """The stream's eight rows are all of its data, as they are in one step of TRL's SFT."""
    demonstrations, data = additions(8, seed=3), rows(kind, 8)
    own = one_step(tmp_path / "own", kind, plain=True, train=data)
    sft = one_step(tmp_path / "sft", "sft", plain=True, train=demonstrations)
    mixed = one_step(
        tmp_path / "mixed", kind, names=["chord:mu=0.3,mu_end=0.3"], train=data, streams={"sft": demonstrations}
    )
    for name, weight in mixed.items():
        # fp32 sums over rows in another order, times the rate
        torch.testing.assert_close(weight, 0.7 * own[name] + 0.3 * sft[name], rtol=0, atol=1e-6)
    assert not all(torch.allclose(weight, own[name], rtol=0, atol=1e-5) for name, weight in mixed.items())


def test_equal_rewards_leave_rloo_its_kl_term(tmp_path: Path) -> None:
    """It is part of RLOO's rewards, so that the advantages of a group with equal rewards are not zero."""
    trainer = MAKE["rloo"](
        tmp_path / "run",
        names=["surgery"],
        reward=constant_reward,
        streams={"sft": additions(8)},
        **{**SGD, "max_steps": 3, "beta": 1.0, "learning_rate": 1.0},
    )
    trainer.train()
    norms = [entry["surgery/grad_norm_rl"] for entry in trainer.state.log_history if "surgery/grad_norm_rl" in entry]
    assert norms[0] == 0  # the policy is the reference
    assert min(norms[1:]) > 0


@pytest.mark.parametrize(
    ("kind", "plugin", "option"),
    [
        ("dpo", "chord:demonstrations=chosen", "demonstrations='chosen'"),
        ("kto", "surgery:stream_row=row", "stream_row='row'"),
        ("distillation", "chord:reward=digits", "reward='digits'"),
        ("dpo", "surgery:solved_at=0.5", "solved_at=0.5"),
        ("kto", "parallel-averaging:skip_equal_rewards=true", "skip_equal_rewards=True"),
    ],
)
def test_options_about_rewards_are_refused_where_there_are_none(
    tmp_path: Path, kind: str, plugin: str, option: str
) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"{option} is about completions that are rewarded, .* {kind} rewards"
    ):
        MAKE[kind](tmp_path / "run", names=[plugin], streams={"sft": additions(8)})
