"""Gates and objectives that are the same in gradient, and limits of one objective that are another."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from trl_ext_objectives.chord_phi import ChordPhi
from trl_ext_objectives.deft import DEFT
from trl_ext_objectives.dft import DFT
from trl_ext_objectives.focal import Focal
from trl_ext_objectives.gem import GEM
from trl_ext_objectives.huber import Huber
from trl_ext_objectives.mixture import Mixture
from trl_ext_objectives.nll import NLL
from trl_ext_objectives.objective import Objective
from trl_ext_objectives.power import Power
from trl_ext_objectives.psft import PSFT
from trl_ext_objectives.threshold import Threshold

from trl_ext.records import TokenRecord

MakeRecord = Callable[..., TokenRecord]


def logits_and_labels(vocab: int = 19) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 12, vocab, generator=generator, dtype=torch.float64)
    return logits, torch.randint(vocab, (2, 12), generator=generator)


def gradient(objective: Objective, record: MakeRecord, **fields: Tensor) -> Tensor:
    logits, labels = logits_and_labels()
    logits.requires_grad_()
    loss = objective.per_token_loss(record(logits, labels, **fields))
    return torch.autograd.grad(loss.sum(), logits)[0]


def integral(gate: Callable[[Tensor], Tensor], p: Tensor) -> Tensor:
    """f(p) = integral of g(u) / u from p to 1, by the midpoint rule in log u (20,000 steps: error below 1e-8)."""
    steps = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    log_u = p.log()[..., None] * steps
    return (gate(log_u.exp()) * -p.log()[..., None]).mean(-1)


@pytest.mark.parametrize(
    ("gate", "objective"),
    [
        (lambda u: torch.ones_like(u), NLL()),
        (lambda u: u, Power(1.0)),
        (lambda u: u**3, Power(3.0)),
        (lambda u: u * (1 - u), Huber(1.0)),
    ],
    ids=["1 = nll", "p = power-1", "p^3 = power-3", "p(1-p) = huber-1"],
)
def test_gated_nll_has_the_gradient_of_the_gates_integral(
    gate: Callable[[Tensor], Tensor], objective: Objective, record: MakeRecord
) -> None:
    """Duality: sg[g(p)] NLL is f(p) in gradient, and f is the objective in value."""
    logits, labels = logits_and_labels()
    logits.requires_grad_()
    tokens = record(logits, labels)
    gated = -gate(tokens.log_probs.detach().exp()) * tokens.log_probs
    (expected,) = torch.autograd.grad(gated.sum(), logits)
    torch.testing.assert_close(gradient(objective, record), expected, rtol=1e-10, atol=1e-13)
    value = objective.per_token_loss(record(logits.detach(), labels))
    torch.testing.assert_close(value, integral(gate, tokens.log_probs.detach().exp()), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (DFT(), Power(1.0)),
        (ChordPhi(), Huber(1.0)),
        (Focal(0.0), NLL()),
        (Threshold(0.0), NLL()),
        (Threshold(1.0, side="below"), NLL()),
        (Threshold(0.0, loss="1-p"), Power(1.0)),
        (GEM(1.0, "linear"), NLL()),
        (Mixture("dft", "nll", 1.0), DFT()),
        (Mixture("dft", "nll", 0.0), NLL()),
    ],
    ids=lambda objective: repr(objective),
)
def test_equal_in_gradient(one: Objective, other: Objective, record: MakeRecord) -> None:
    torch.testing.assert_close(gradient(one, record), gradient(other, record), rtol=1e-12, atol=1e-15)


def test_small_alpha_is_nll(record: MakeRecord) -> None:
    # s(p) = p^alpha = 1 + alpha log p + ...: at alpha = 1e-6 the two differ by 1e-6 x |log p| < 2e-5.
    torch.testing.assert_close(gradient(Power(1e-6), record), gradient(NLL(), record), rtol=2e-5, atol=1e-12)
    log_probs = torch.tensor([-12.0, -1.0, -1e-7])  # fp32: (1 - p^alpha) / alpha must not cancel
    value = Power(1e-6).per_token_loss(TokenRecord(log_probs, log_probs, log_probs < 0, True, log_probs, 1, 0.0))
    # (1 - p^alpha) / alpha = -log p (1 + alpha log p / 2 + ...), and a few roundings.
    expected = -log_probs * (1 + 1e-6 * log_probs / 2)
    torch.testing.assert_close(value, expected, rtol=8 * torch.finfo(torch.float32).eps, atol=0)


def test_dft_of_a_uniform_pair_is_half_of_the_cross_entropy(record: MakeRecord) -> None:
    tokens = record(torch.zeros(1, 5, 2), torch.zeros(1, 5, dtype=torch.long))
    assert DFT().per_token_loss(tokens).tolist() == [pytest.approx([math.log(2) / 2] * 5)]


def test_deft_goes_from_nll_to_one_minus_p_with_the_concentration(record: MakeRecord) -> None:
    sure = {"extras": {"log_sum_sq_probs": torch.zeros(2, 12, dtype=torch.float64)}}  # all mass on one token: a = 1
    torch.testing.assert_close(gradient(DEFT(), record, **sure), gradient(Power(1.0), record))
    spread = {"extras": {"log_sum_sq_probs": torch.full((2, 12), -20.0, dtype=torch.float64)}}  # a = 2e-9
    torch.testing.assert_close(gradient(DEFT(), record, **spread), gradient(NLL(), record), rtol=1e-7, atol=1e-12)


def test_psft_right_after_a_refresh_is_nll_in_gradient(record: MakeRecord) -> None:
    """With p_old = p the ratio is 1, and its gradient that of log p."""
    logits, labels = logits_and_labels()
    old = record(logits, labels).log_probs
    torch.testing.assert_close(gradient(PSFT(), record, reference_log_probs=old), gradient(NLL(), record))


def test_argmax_of_the_power_weight_is_at_the_tables_place(record: MakeRecord) -> None:
    for alpha in (0.5, 1.0, 10.0):
        p = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
        logits = torch.stack([torch.logit(p), torch.zeros_like(p)], -1)[None].requires_grad_()
        loss = Power(alpha).per_token_loss(record(logits, torch.zeros(1, 999, dtype=torch.long)))
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        best = p[(-grad[0, :, 0]).argmax()]
        assert best == pytest.approx(alpha / (alpha + 1), abs=2e-3)
