"""1 - p of a label: exact in value and gradient at both ends, where `1 - log_probs.exp()` is not."""

from __future__ import annotations

import pytest
import torch

from trl_ext.numerics import one_minus_exp
from trl_ext.records import TokenRecord


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_minus_p_is_exact_from_far_below_one_to_just_below(dtype: torch.dtype) -> None:
    log_probs = torch.tensor([-1e-12, -1e-7, -1e-3, -0.49, -0.51, -3.0, -40.0], dtype=dtype, requires_grad=True)
    (slope,) = torch.autograd.grad(one_minus_exp(log_probs).sum(), log_probs)
    exact = log_probs.detach().double()
    rounding = 8 * torch.finfo(dtype).eps  # expm1 or exp, and the subtraction from 1, are each within two of them
    torch.testing.assert_close(one_minus_exp(log_probs).double(), -torch.expm1(exact), rtol=rounding, atol=0)
    torch.testing.assert_close(slope.double(), -exact.exp(), rtol=rounding, atol=0)


def test_the_record_gives_probabilities_and_their_complement() -> None:
    log_probs = torch.tensor([[-1e-7, -2.0, 0.0]], requires_grad=True)  # the last one is masked
    mask = torch.tensor([[True, True, False]])
    tokens = TokenRecord(log_probs, log_probs, mask, True, torch.tensor(2.0), 1, 0.0)
    assert tokens.probs[0, 1].item() == pytest.approx(0.1353353, rel=1e-6)
    # A naive 1 - p is 1.19e-7 here, 19 % off.
    assert tokens.one_minus_probs[0].tolist() == pytest.approx([1e-7, 0.8646647, 0.0], rel=1e-6)
    assert tokens.one_minus_probs.requires_grad
    assert tokens.one_minus_probs is tokens.one_minus_probs  # computed once
