"""Schedule-free optimisers, which count in their groups and evaluate other weights, against two of them run apart."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from mixing_runs import Recorder, grpo, prompts
from test_composite import equal, gradients, parameters, step, values
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from trl_ext_mixing import chunks
from trl_ext_mixing.composite import BranchAverage

from trl_ext.errors import ConfigurationError

schedulefree = pytest.importorskip("schedulefree")

C, RATIO = 0.25, 0.5


def make(params: Sequence[nn.Parameter], lr: float = 0.1) -> Any:
    return schedulefree.AdamWScheduleFree(params, lr=lr, warmup_steps=3, weight_decay=0.1)


class Apart:
    """Two optimisers on weights of their own, brought together by hand after every step."""

    def __init__(self) -> None:
        self.params = parameters(), parameters()
        self.optimizers = make(self.params[0]), make(self.params[1], 0.1 * RATIO)

    def mean(self) -> list[Tensor]:
        return [(1 - C) * a.detach() + C * b.detach() for a, b in zip(*self.params, strict=True)]

    def step(self, seed: int) -> None:
        for optimizer, params, grads in zip(
            self.optimizers, self.params, (gradients(seed), gradients(seed + 1000)), strict=True
        ):
            optimizer.train()
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            optimizer.step()
        self.together()

    def eval(self) -> list[Tensor]:
        """The mean of both evaluation weights; those to train on are put back exactly."""
        before = [[p.detach().clone() for p in params] for params in self.params]
        for optimizer in self.optimizers:
            optimizer.eval()
        mean = self.mean()
        for optimizer, params, old in zip(self.optimizers, self.params, before, strict=True):
            optimizer.train()
            for p, t in zip(params, old, strict=True):
                p.data.copy_(t)
        return mean

    def together(self) -> None:
        mean = self.mean()
        for params in self.params:
            for p, m in zip(params, mean, strict=True):
                p.data.copy_(m)


def branches(params: list[nn.Parameter], lr: float = 0.1) -> BranchAverage:
    optimizer = BranchAverage(make(params, lr), lr_ratio=RATIO)
    optimizer.coefficient = C
    optimizer.train()
    return optimizer


def close(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """fp64, whose rounding `eval` multiplies by 1 / beta_1 and the weighted mean adds to."""
    return all(torch.allclose(x, y, rtol=0, atol=1e-13) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("chunk", [1 << 20, 8])
def test_steps_and_evaluation_weights_are_the_mean_of_two_run_apart(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK", {"cpu": chunk})
    params, apart = parameters(), Apart()
    optimizer = branches(params)
    for seed in range(8):
        step(optimizer, params, seed)
        apart.step(seed)
        assert close(values(params), apart.mean()), seed
    trained_on = values(params)
    optimizer.eval()
    assert close(values(params), apart.eval())
    assert not close(values(params), trained_on)
    optimizer.eval()
    optimizer.train()
    assert close(values(params), trained_on)
    step(optimizer, params, 8)
    apart.step(8)
    assert close(values(params), apart.mean())


@pytest.mark.parametrize("evaluating", [False, True])
def test_a_state_continues_to_the_last_bit_also_from_an_evaluation(evaluating: bool) -> None:
    params = parameters()
    optimizer = branches(params)
    for seed in range(3):
        step(optimizer, params, seed)
    if evaluating:
        optimizer.eval()
    again = [nn.Parameter(v) for v in values(params)]
    resumed = BranchAverage(make(again, lr=0.9), lr_ratio=RATIO)
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    for o, ps in ((optimizer, params), (resumed, again)):
        o.train()
        for seed in range(3, 6):
            step(o, ps, seed)
        o.eval()
    assert equal(values(params), values(again))


def test_the_state_of_a_plain_one_is_refused() -> None:
    params = parameters()
    plain = make(params)
    plain.train()
    for p, g in zip(params, gradients(0), strict=True):
        p.grad = g
    plain.step()
    with pytest.raises(ConfigurationError, match=r"plain AdamWScheduleFree.*start a new run"):
        BranchAverage(make(params)).load_state_dict(plain.state_dict())


def test_a_run_with_evaluations_resumes_to_the_last_bit(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "optim": "schedule_free_adamw",
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "per_device_eval_batch_size": 4,
        "weight_decay": 0.1,
        "eval_data": prompts(4),
    }
    line = ["parallel-averaging:batch_size=3,lr_ratio=0.5,coefficient=0.25"]
    whole, rest = Recorder(), Recorder()
    grpo(tmp_path, line, recorder=whole, **settings).train()
    grpo(tmp_path, line, recorder=rest, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert equal(whole.weights[-1], rest.weights[-1])
    assert not equal(whole.weights[-2], whole.weights[-1])


def test_from_a_plain_checkpoint_a_run_starts_anew_as_the_refusal_advises(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"optim": "schedule_free_adamw", "save_strategy": "steps", "save_steps": 1}
    grpo(tmp_path, [], stream=False, max_steps=1, **settings).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    mixed = grpo(tmp_path, ["parallel-averaging"], max_steps=2, reset_plugin_state=True, **settings)
    with pytest.raises(ConfigurationError, match="give the checkpoint as the model, and start a new run from it"):
        mixed.train(resume_from_checkpoint=checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    anew = grpo(tmp_path / "anew", ["parallel-averaging"], model=model, max_steps=1, **settings)
    anew.train()
    assert anew.state.global_step == 1
