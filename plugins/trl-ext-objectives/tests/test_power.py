"""The power family against its closed form and against autograd on full logits."""

import math

import pytest
import torch
from trl_ext_objectives.power import Power, power_loss

from trl_ext.records import TokenRecord

GRID = (1e-8, 1e-4, 0.1, 0.5, 0.9, 1 - 1e-4, 1 - 1e-8)


def record(log_probs: torch.Tensor, mask: torch.Tensor | None = None) -> TokenRecord:
    return TokenRecord(
        log_probs=log_probs,
        entropy=torch.zeros_like(log_probs),
        mask=torch.ones_like(log_probs, dtype=torch.bool) if mask is None else mask,
        training=True,
        denominator=torch.tensor(float(log_probs.numel())),
        accumulation_steps=1,
        progress=0.0,
    )


@pytest.mark.parametrize("alpha", [0.01, 0.5, 1.0, 10.0])
def test_weight_is_p_to_the_alpha_times_one_minus_p(alpha: float) -> None:
    p = torch.tensor(GRID, dtype=torch.float64)
    logits = torch.stack([torch.logit(p), torch.zeros_like(p)], -1)[None].requires_grad_()
    Power(alpha).per_token_loss(record(logits.log_softmax(-1)[..., 0])).sum().backward()
    weight = p**alpha * (1 - p)
    # fp64: the two sides round differently in about ten operations
    torch.testing.assert_close(-logits.grad[0, :, 0], weight, rtol=1e-6, atol=1e-15)
    torch.testing.assert_close(logits.grad[0, :, 1], weight, rtol=1e-6, atol=1e-15)


def test_gradient_in_fp32_equals_full_logits_autograd_in_fp64() -> None:
    logits = torch.randn(4, 7, 31, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.randint(31, (4, 7, 1), generator=torch.Generator().manual_seed(1))
    exact = logits.clone().requires_grad_()
    p = exact.softmax(-1).gather(-1, labels)
    ((1 - p**3) / 3).sum().backward()
    single = logits.float().requires_grad_()
    Power(3.0).per_token_loss(record(single.log_softmax(-1).gather(-1, labels)[..., 0])).sum().backward()
    error = (single.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < 1e-6  # fp32 rounds to 6e-8; a dozen operations


def test_small_alpha_is_nll_and_precise_near_one() -> None:
    log_probs = torch.tensor([-12.0, -1.0, -1e-7])
    torch.testing.assert_close(power_loss(log_probs, 1e-6), -log_probs, rtol=1e-5, atol=0)


def test_alpha_one_is_one_minus_p() -> None:
    log_probs = torch.tensor([GRID], dtype=torch.float64).log()
    torch.testing.assert_close(
        Power(1.0).per_token_loss(record(log_probs)), -torch.expm1(log_probs), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan])
def test_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"power: alpha=.* is not a positive number"):
        Power(alpha)
