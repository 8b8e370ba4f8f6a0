"""The composite optimiser on its own: chunks, state dicts, schedulers, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from trl_ext_mixing import chunks
from trl_ext_mixing.composite import BranchAverage

from trl_ext.errors import ConfigurationError


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,), (2, 2, 2), (7,)]
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def gradients(seed: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype) for p in parameters()]


def step(optimizer: BranchAverage, params: list[nn.Parameter], seed: int) -> None:
    for p, g in zip(params, gradients(seed), strict=True):
        p.grad = g.to(p.dtype)
    sft = gradients(seed + 1000)
    optimizer.give_sft({p: g.to(p.dtype) for p, g in zip(params, sft, strict=True)})
    optimizer.step()


def values(params: list[nn.Parameter]) -> list[torch.Tensor]:
    return [p.detach().clone() for p in params]


def equal(a: list[Any], b: list[Any]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for chunk in (1 << 25, 9, 1):
        monkeypatch.setattr(chunks, "CHUNK", {"cpu": chunk})
        params = parameters()
        optimizer = BranchAverage(torch.optim.AdamW(params, 0.1))
        for seed in range(5):
            step(optimizer, params, seed)
        results.append((values(params), list(optimizer.updates.read().values())))
    assert equal(results[0][0], results[1][0])
    assert equal(results[0][0], results[2][0])
    # Sums of fp32 squares in another order.
    assert results[0][1] == pytest.approx(results[2][1], rel=1e-5)


def test_gradients_are_put_back_and_matched_by_parameter() -> None:
    params = parameters()
    optimizer = BranchAverage(torch.optim.SGD([{"params": params[2:]}, {"params": params[:2], "lr": 0.5}], 0.1))
    before = values(params)
    rl, sft = gradients(1), gradients(2)
    for p, g in zip(params, rl, strict=True):
        p.grad = g
    optimizer.give_sft(dict(zip(params, sft, strict=True)))
    optimizer.step()
    for i, (p, b) in enumerate(zip(params, before, strict=True)):
        lr = 0.5 if i < 2 else 0.1
        # SGD in closed form. Eight roundings, here and there, of numbers below 4 in fp64.
        torch.testing.assert_close(p.detach(), b - lr * (rl[i] + sft[i]) / 2, rtol=0, atol=8 * 4 * 2**-53)
        assert p.grad is rl[i]


@pytest.mark.parametrize("c", [0.0, 0.3, 0.5, 0.85, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_that_neither_branch_moves_stay_where_they_are(c: float, dtype: torch.dtype) -> None:
    """Products with c and 1 - c, rounded in bf16, would move a fifth of them at c = 0.9."""
    params = [nn.Parameter(torch.randn(4096, generator=torch.Generator().manual_seed(0)).to(dtype))]
    optimizer = BranchAverage(torch.optim.AdamW(params, 0.1, weight_decay=0.0))
    optimizer.coefficient = c
    before = values(params)
    params[0].grad = torch.zeros_like(params[0])
    optimizer.give_sft({params[0]: torch.zeros_like(params[0])})
    optimizer.step()
    assert equal(values(params), before)


def test_update_diagnostics_match_the_closed_form_for_sgd() -> None:
    params = parameters()
    optimizer = BranchAverage(torch.optim.SGD(params, 0.1), lr_ratio=3.0)
    rl, sft = gradients(1), gradients(2)
    for p, g in zip(params, rl, strict=True):
        p.grad = g
    optimizer.give_sft(dict(zip(params, sft, strict=True)))
    optimizer.step()
    a, b = (torch.cat([g.flatten() for g in gs]) for gs in (rl, sft))
    read = optimizer.updates.read()
    assert read["update_norm_rl"] == pytest.approx(0.1 * float(a.norm()), rel=1e-6)
    assert read["update_norm_sft"] == pytest.approx(0.3 * float(b.norm()), rel=1e-6)
    assert read["update_cosine"] == pytest.approx(float(torch.cosine_similarity(a, b, 0)), abs=1e-6)
    assert read["update_sign_conflicts"] == pytest.approx(float(((a * b) < 0).double().mean()), rel=1e-6)
    assert optimizer.updates.read() == {}


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop])
def test_state_dict_round_trip_continues_to_the_last_bit(make: Any) -> None:
    params = parameters()
    whole = BranchAverage(make(params, lr=0.1))
    for seed in range(6):
        step(whole, params, seed)

    first = parameters()
    interrupted = BranchAverage(make(first, lr=0.1))
    for seed in range(3):
        step(interrupted, first, seed)
    saved = interrupted.state_dict()
    assert all(key.endswith(("_rl", "_sft")) for entries in saved["state"].values() for key in entries)
    again = [nn.Parameter(v) for v in values(first)]
    resumed = BranchAverage(make(again, lr=0.9))
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["lr"] == 0.1
    for seed in range(3, 6):
        step(resumed, again, seed)
    assert equal(values(params), values(again))


def test_fp32_moments_of_bf16_weights_stay_fp32_when_loaded() -> None:
    """torch casts entries of a state to the weights' dtype, all but `step`; a step count in bf16 stops at 256."""
    params = parameters(torch.bfloat16)
    optimizer = BranchAverage(torch.optim.AdamW(params, 0.1))
    step(optimizer, params, 0)
    resumed = BranchAverage(torch.optim.AdamW(params, 0.1))
    resumed.load_state_dict(optimizer.state_dict())
    assert {entries["step_sft"].dtype for entries in resumed.state.values()} == {torch.float32}


def test_a_plain_state_becomes_the_rl_half() -> None:
    params = parameters()
    plain = torch.optim.AdamW(params, 0.1)
    for p, g in zip(params, gradients(0), strict=True):
        p.grad = g
    plain.step()
    optimizer = BranchAverage(torch.optim.AdamW(params, 0.1))
    optimizer.load_state_dict(plain.state_dict())
    assert torch.equal(
        optimizer.branches["rl"].optimizer.state[params[0]]["exp_avg"], plain.state[params[0]]["exp_avg"]
    )
    assert not optimizer.branches["sft"].optimizer.state


def test_skipped_steps_leave_weights_and_both_states_alone() -> None:
    params = parameters()
    optimizer = BranchAverage(torch.optim.AdamW(params, 0.1))
    step(optimizer, params, 0)
    before = values(params)
    moments = optimizer.state[params[0]]["exp_avg_sft"].clone()
    for p in params:
        p.grad = None
    optimizer.give_sft(dict(zip(params, gradients(5), strict=True)))
    optimizer.step()
    assert equal(values(params), before)
    assert torch.equal(optimizer.state[params[0]]["exp_avg_sft"], moments)


def test_a_skipped_rl_half_moves_by_half_the_sft_update_and_keeps_its_state() -> None:
    params = parameters()
    optimizer = BranchAverage(torch.optim.AdamW(params, 0.1))
    step(optimizer, params, 0)
    start, rl_moment = values(params), optimizer.state[params[0]]["exp_avg_rl"].clone()
    twin = parameters()
    alone = torch.optim.AdamW(twin, 0.1)
    for seed in (1000, 1007):
        for p, g, s in zip(twin, gradients(seed), start if seed == 1007 else values(twin), strict=True):
            p.data.copy_(s)
            p.grad = g
        alone.step()
    optimizer.skip_rl = True
    step(optimizer, params, 7)
    assert equal(values(params), [(s + t.detach()) / 2 for s, t in zip(start, twin, strict=True)])
    assert torch.equal(optimizer.state[params[0]]["exp_avg_rl"], rl_moment)


class EstimatesFromAll(torch.optim.SGD):
    """As Prodigy does: a number for the whole group, from all gradients."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            present = [p.grad for p in group["params"] if p.grad is not None]
            group["d"] = group.get("d", 0.0) + sum(float(g.norm()) for g in present)


class SetsItsRate(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            group["lr"] = group["lr"] / 2


@pytest.mark.parametrize(("kind", "entry"), [(EstimatesFromAll, "d"), (SetsItsRate, "lr")])
def test_optimizers_that_cannot_be_stepped_in_parts_are_refused(
    kind: Any, entry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK", {"cpu": 8})
    params = parameters()
    with pytest.raises(
        ConfigurationError, match=rf"{kind.__name__} keeps {entry} per parameter group.*mode='gradients'"
    ):
        step(BranchAverage(kind(params, 0.1)), params, 0)
    assert all(p.grad is not None for p in params)
