"""On a CUDA device: fused and 8-bit optimisers against two of them run apart, and a run that resumes."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mixing_runs import Recorder, grpo
from torch import Tensor, nn
from trl_ext_mixing.composite import BranchAverage

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def adamw_fused(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr, fused=True, weight_decay=0.1)


def bitsandbytes_8bit(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return pytest.importorskip("bitsandbytes").optim.AdamW8bit(params, lr, weight_decay=0.1)


def torchao_8bit(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return pytest.importorskip("torchao").optim.AdamW8bit(params, lr, weight_decay=0.1)


MAKERS = [adamw_fused, bitsandbytes_8bit, torchao_8bit]


def weights(dtype: torch.dtype) -> list[nn.Parameter]:
    """Large enough for 8-bit states (4,096 values or more), and more than one chunk."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(4096, 2048), (4096, 2048), (2048, 1024), (512,)]
    return [nn.Parameter(torch.randn(s, generator=generator, device="cuda").to(dtype)) for s in shapes]


def gradients(seed: int, params: list[nn.Parameter]) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, device="cuda").to(p.dtype) for p in params]


def step(optimizer: BranchAverage, params: list[nn.Parameter], seed: int) -> None:
    for p, g in zip(params, gradients(seed, params), strict=True):
        p.grad = g
    optimizer.give_sft(dict(zip(params, gradients(seed + 1000, params), strict=True)))
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", MAKERS)
def test_steps_are_the_mean_of_two_run_apart_to_the_last_bit(make: Callable[..., Any], dtype: torch.dtype) -> None:
    params, apart = weights(dtype), (weights(dtype), weights(dtype))
    composite = BranchAverage(make(params, 1e-2), lr_ratio=0.5)
    optimizers = make(apart[0], 1e-2), make(apart[1], 5e-3)
    for seed in range(5):
        step(composite, params, seed)
        for branch, optimizer, offset in zip(apart, optimizers, (0, 1000), strict=True):
            for p, g in zip(branch, gradients(seed + offset, branch), strict=True):
                p.grad = g
            optimizer.step()
        for p, a, b in zip(params, *apart, strict=True):
            mean = a.detach() / 2 + b.detach() / 2
            assert torch.equal(p.detach(), mean), seed
            a.data.copy_(mean)
            b.data.copy_(mean)
    assert not torch.equal(params[0].detach(), weights(dtype)[0].detach())


@pytest.mark.parametrize("make", MAKERS)
def test_a_state_on_the_device_continues_to_the_last_bit(make: Callable[..., Any]) -> None:
    params = weights(torch.float32)
    composite = BranchAverage(make(params, 1e-2))
    for seed in range(3):
        step(composite, params, seed)
    again = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = BranchAverage(make(again, 1e-2))
    file = io.BytesIO()
    torch.save(composite.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for seed in range(3, 6):
        step(composite, params, seed)
        step(resumed, again, seed)
    assert all(torch.equal(a.detach(), b.detach()) for a, b in zip(params, again, strict=True))


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_8bit", "schedule_free_adamw"])
def test_a_run_in_bf16_resumes_to_the_last_bit(tmp_path: Path, optim: str) -> None:
    pytest.importorskip({"adamw_8bit": "bitsandbytes", "schedule_free_adamw": "schedulefree"}.get(optim, "torch"))
    settings: dict[str, Any] = {"use_cpu": False, "bf16": True, "optim": optim, "dtype": torch.float32}
    line = ["parallel-averaging:batch_size=3,coefficient=0.25"]
    whole, rest = Recorder(), Recorder()
    grpo(tmp_path, line, recorder=whole, save_strategy="steps", save_steps=2, **settings).train()
    grpo(tmp_path, line, recorder=rest, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(whole.weights[-1], rest.weights[-1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(whole.weights[2], whole.weights[4], strict=True))


def test_resident_scratch_is_that_of_a_chunk() -> None:
    """Beyond both states a step holds three copies of a chunk of 2^24, however large the model."""
    params = [nn.Parameter(torch.randn(1 << 24, device="cuda")) for _ in range(6)]
    composite = BranchAverage(torch.optim.SGD(params, 1e-2))
    step(composite, params, 0)
    for p, g in zip(params, gradients(1, params), strict=True):
        p.grad = g
    composite.give_sft(dict(zip(params, gradients(2, params), strict=True)))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    composite.step()
    chunk = 4 * (1 << 24)
    assert torch.cuda.max_memory_allocated() - before <= 4.1 * chunk  # and one temporary of a comparison
