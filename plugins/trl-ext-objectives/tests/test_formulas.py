"""Every objective against full-logits autograd in fp64, with formulas written a second time, from p and the logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trl_ext_objectives.chord_phi import ChordPhi
from trl_ext_objectives.deft import DEFT
from trl_ext_objectives.dft import DFT
from trl_ext_objectives.eaft import EAFT
from trl_ext_objectives.entropy import Entropy
from trl_ext_objectives.figures import HeadOutputs
from trl_ext_objectives.focal import Focal
from trl_ext_objectives.gem import GEM
from trl_ext_objectives.huber import Huber
from trl_ext_objectives.idft import IDFT
from trl_ext_objectives.iw_sft import IwSFT
from trl_ext_objectives.log1mp import Log1mp
from trl_ext_objectives.mixture import Mixture
from trl_ext_objectives.nll import NLL
from trl_ext_objectives.objective import Objective
from trl_ext_objectives.power import Power
from trl_ext_objectives.psft import PSFT
from trl_ext_objectives.rho1 import Rho1
from trl_ext_objectives.talr import TALR
from trl_ext_objectives.threshold import Threshold

from trl_ext.records import TokenRecord

MakeRecord = Callable[..., TokenRecord]


@dataclass
class Batch:
    """What an oracle sees: everything in fp64, from the logits themselves."""

    logits: Tensor
    labels: Tensor
    mask: Tensor
    reference: Tensor

    @property
    def probs(self) -> Tensor:
        return self.logits.softmax(-1)

    @property
    def p(self) -> Tensor:
        return self.probs.gather(-1, self.labels[..., None])[..., 0]

    @property
    def entropy(self) -> Tensor:
        return -(self.probs * self.probs.log()).sum(-1)

    def top_entropy(self, count: int) -> Tensor:
        top = self.probs.sort(-1, descending=True).values[..., :count]
        top = top / top.sum(-1, keepdim=True)
        return -(top * top.log()).sum(-1)

    def median_nll(self) -> Tensor:
        ordered = sorted((-self.p.detach().log())[self.mask].tolist())
        return torch.tensor(ordered[(len(ordered) - 1) // 2], dtype=torch.float64)

    def means_over_rows(self, x: Tensor) -> Tensor:
        return (x * self.mask).sum(1, keepdim=True) / self.mask.sum(1, keepdim=True).clamp(min=1)

    def top(self, share: float) -> Tensor:
        excess = (self.reference - self.p.detach().log())[self.mask]
        cut = excess.sort(descending=True).values[math.ceil(round(share * len(excess), 6)) - 1]
        return self.reference - self.p.detach().log() >= cut


def _huber(b: Batch, delta: float) -> Tensor:
    e = 1 - b.p
    return torch.nn.functional.huber_loss(e, torch.zeros_like(e), reduction="none", delta=delta)


# Objective, and its per-token loss by an independent formula.
ORACLES: dict[str, tuple[Objective, Callable[[Batch], Tensor]]] = {
    "nll": (NLL(), lambda b: -b.p.log()),
    "power-0.3": (Power(0.3), lambda b: (1 - b.p**0.3) / 0.3),
    "power-1": (Power(1.0), lambda b: 1 - b.p),
    "power-10": (Power(10.0), lambda b: (1 - b.p**10) / 10),
    "log1mp": (Log1mp(), lambda b: (1 - b.p).log()),
    "focal-0.5": (Focal(0.5), lambda b: -((1 - b.p) ** 0.5) * b.p.log()),
    "focal-2": (Focal(2.0), lambda b: -((1 - b.p) ** 2) * b.p.log()),
    "huber-0.4": (Huber(0.4), lambda b: _huber(b, 0.4)),
    "huber-1": (Huber(1.0), lambda b: (1 - b.p) ** 2 / 2),
    "threshold-above": (Threshold(0.02), lambda b: -b.p.log() * (b.p >= 0.02)),
    "threshold-below-1-p": (Threshold(0.02, side="below", loss="1-p"), lambda b: (1 - b.p) * (b.p <= 0.02)),
    "dft": (DFT(), lambda b: -b.p.detach() * b.p.log()),
    "eaft": (EAFT(), lambda b: -(b.top_entropy(20).detach() / math.log(20)) * b.p.log()),
    "eaft-5-2": (EAFT(5, 2), lambda b: -((b.top_entropy(5).detach() / math.log(5)) ** 2) * b.p.log()),
    "eaft-whole": (EAFT(gate="whole"), lambda b: -(b.entropy.detach() / math.log(20)).clamp(max=1) * b.p.log()),
    "eaft-whole-open": (
        EAFT(6, gate="whole"),
        lambda b: -(b.entropy.detach() / math.log(6)).clamp(max=1) * b.p.log(),
    ),
    "eaft-whole-2": (
        EAFT(40, 2, "whole"),
        lambda b: -((b.entropy.detach() / math.log(40)).clamp(max=1) ** 2) * b.p.log(),
    ),
    "deft": (DEFT(), lambda b: (1 - b.p ** (a := (b.probs**2).sum(-1).detach())) / a),
    "talr": (TALR(), lambda b: -(b.p.detach() ** (1 / b.median_nll())) * b.p.log()),
    "entropy": (Entropy(0.3), lambda b: -b.p.log() - 0.3 * b.entropy),
    "idft": (
        IDFT(),
        lambda b: -(b.p ** (1 / (b.p * b.entropy.exp())).clamp(0.1, 2)).detach() * b.p.log(),
    ),
    "chord-phi": (ChordPhi(), lambda b: -(b.p * (1 - b.p)).detach() * b.p.log()),
    "psft": (
        PSFT(),
        lambda b: -torch.where((r := b.p / b.reference.exp()) > 1.28, 1.28, r),
    ),
    "iw-sft": (
        IwSFT(),
        lambda b: -b.means_over_rows(b.p.detach().log() - b.reference).exp().clamp(max=16) * b.p.log(),
    ),
    "iw-sft-capped": (
        IwSFT("start", 1.0, 0.95),
        lambda b: -b.means_over_rows(b.p.detach().log() - b.reference).exp().clamp(max=0.95) * b.p.log(),
    ),
    "rho1": (Rho1("start", normalization="valid"), lambda b: -b.p.log() * b.top(0.6)),
    "mixture": (
        Mixture("power:alpha=2", "dft", 0.3),
        lambda b: 0.3 * (1 - b.p**2) / 2 - 0.7 * b.p.detach() * b.p.log(),
    ),
}
EVERY = pytest.mark.parametrize("name", ORACLES)


def draw_batch(seed: int, rows: int = 3, width: int = 9, vocab: int = 23, masked: float = 0.3) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    # As fp32 numbers, so that both precisions start from the same logits.
    logits = (2 * torch.randn(rows, width, vocab, generator=generator)).double()
    labels = torch.randint(vocab, (rows, width), generator=generator)
    mask = torch.rand(rows, width, generator=generator) >= masked
    mask[0, 0] = True
    reference = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    reference = (reference + 0.5 * torch.randn(rows, width, generator=generator)).clamp(max=-1e-3)
    return Batch(logits, labels, mask, reference.float().double())


def oracle_gradient(name: str, batch: Batch) -> Tensor:
    exact = Batch(batch.logits.clone().requires_grad_(), batch.labels, batch.mask, batch.reference)
    loss = torch.where(batch.mask, ORACLES[name][1](exact), 0.0)
    return torch.autograd.grad(loss.sum(), exact.logits)[0]


def plugin_loss(name: str, batch: Batch, logits: Tensor, record: MakeRecord) -> Tensor:
    tokens = record(logits, batch.labels, batch.mask, reference_log_probs=batch.reference.to(logits.dtype))
    return torch.where(batch.mask, ORACLES[name][0].per_token_loss(tokens), 0.0)


@EVERY
def test_gradient_equals_full_logits_autograd(name: str, record: MakeRecord) -> None:
    batch = draw_batch(seed=1)
    exact = oracle_gradient(name, batch)
    # The weight of a token multiplies the rounding of log p, at most by |log p| d log w / d log p, some 20 for idft.
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 64 * torch.finfo(torch.float32).eps)):
        logits = batch.logits.to(dtype).requires_grad_()
        (gradient,) = torch.autograd.grad(plugin_loss(name, batch, logits, record).sum(), logits)
        assert (gradient.double() - exact).norm() / exact.norm() < tolerance


@EVERY
def test_value_equals_the_formula(name: str, record: MakeRecord) -> None:
    batch = draw_batch(seed=2)
    expected = torch.where(batch.mask, ORACLES[name][1](batch), 0.0)
    torch.testing.assert_close(plugin_loss(name, batch, batch.logits, record), expected, rtol=1e-12, atol=1e-14)


@EVERY
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_gradient_properties(name: str, record: MakeRecord, data: st.DataObject) -> None:
    """Zero on masked tokens, zero summed over the vocabulary, equal to the oracle, for any shape and mask."""
    batch = draw_batch(
        seed=data.draw(st.integers(0, 2**20)),
        rows=data.draw(st.integers(1, 4)),
        width=data.draw(st.integers(1, 7)),
        vocab=data.draw(st.integers(2, 33)),
        masked=data.draw(st.sampled_from([0.0, 0.5, 0.95])),
    )
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    logits = batch.logits.to(dtype).requires_grad_()
    loss = plugin_loss(name, batch, logits, record)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.dtype == dtype
    assert torch.equal(gradient[~batch.mask], torch.zeros_like(gradient[~batch.mask]))
    # The softmax rounds 1 - p to eps, and the slope dL/dlog p = W / (1 - p) multiplies that.
    slope = gradient.abs().sum(-1) / (1 - batch.p)
    assert (gradient.sum(-1).abs() <= 8 * torch.finfo(dtype).eps * (1 + slope)).all()
    exact = oracle_gradient(name, batch)
    # A token whose p lies within rounding of a threshold may fall on either side; none of the others may differ.
    wrong = (gradient.double() - exact).norm(dim=-1) > 64 * torch.finfo(dtype).eps * (1 + slope)
    assert wrong.sum() <= (1 if name in ("threshold-above", "threshold-below-1-p", "rho1") else 0)


GRID = (1e-8, 1e-6, 1e-3, 0.02, 0.2, 0.5, 0.8, 0.999, 1 - 1e-6, 1 - 1e-8)
# The weight W(p) = -dL/dz_label of the table in arXiv 2510.00526 and of the relatives' gates.
WEIGHTS: dict[str, tuple[Objective, Callable[[float], float]]] = {
    "nll": (NLL(), lambda p: 1 - p),
    "power-0.01": (Power(0.01), lambda p: p**0.01 * (1 - p)),
    "power-1": (Power(1.0), lambda p: p * (1 - p)),
    "power-10": (Power(10.0), lambda p: p**10 * (1 - p)),
    "threshold": (Threshold(0.2), lambda p: (1 - p) * (p >= 0.2)),
    "threshold-below": (Threshold(0.2, side="below"), lambda p: (1 - p) * (p <= 0.2)),
    "threshold-1-p": (Threshold(0.2, loss="1-p"), lambda p: p * (1 - p) * (p >= 0.2)),
    "log1mp": (Log1mp(), lambda p: p),
    "focal-0.5": (Focal(0.5), lambda p: (1 - p) ** 0.5 * ((1 - p) - 0.5 * p * math.log(p))),
    "focal-2": (Focal(2.0), lambda p: (1 - p) ** 2 * ((1 - p) - 2 * p * math.log(p))),
    "huber-1": (Huber(1.0), lambda p: p * (1 - p) ** 2),
    "huber-0.4": (Huber(0.4), lambda p: p * (1 - p) * min(1 - p, 0.4)),
    "dft": (DFT(), lambda p: p * (1 - p)),
    "chord-phi": (ChordPhi(), lambda p: p * (1 - p) ** 2),
}


def two_token_weights(objective: Objective, grid: tuple[float, ...], record: MakeRecord) -> Tensor:
    # logit(p) over two tokens; computed from 1 - p, which fp64 holds exactly for this grid.
    p = torch.tensor(grid, dtype=torch.float64)
    logits = torch.stack([p.log() - torch.log1p(-p), torch.zeros_like(p)], -1)[None].requires_grad_()
    tokens = record(logits, torch.zeros(1, len(grid), dtype=torch.long))
    (gradient,) = torch.autograd.grad(objective.per_token_loss(tokens).sum(), logits)
    torch.testing.assert_close(gradient[0, :, 0], -gradient[0, :, 1], rtol=1e-6, atol=1e-15)
    return -gradient[0, :, 0]


@pytest.mark.parametrize("name", WEIGHTS)
def test_weight_matches_the_table(name: str, record: MakeRecord) -> None:
    objective, weight = WEIGHTS[name]
    # 0.2 is the threshold itself; which side of it log(0.2) rounds to is tested apart.
    grid = tuple(p for p in GRID if not (name.startswith("threshold") and p == 0.2))
    expected = torch.tensor([weight(p) for p in grid], dtype=torch.float64)
    # fp64 has 1 - p to 1e-8 relative at p = 1 - 1e-8; W is as exact as that.
    torch.testing.assert_close(two_token_weights(objective, grid, record), expected, rtol=1e-7, atol=0)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_probabilities_and_masked_positions_stay_finite(
    name: str, dtype: torch.dtype, record: MakeRecord
) -> None:
    p = torch.tensor([GRID, GRID], dtype=torch.float64)
    log_probs = torch.where(p > 0.5, torch.log1p(-(1 - p)), p.log()).to(dtype)
    log_probs = torch.cat([log_probs, torch.zeros(2, 2, dtype=dtype)], 1).requires_grad_()  # p = 1: rounded, and masked
    mask = torch.ones_like(log_probs, dtype=torch.bool)
    mask[:, -1] = False
    tokens = TokenRecord(
        log_probs=log_probs,
        entropy=torch.zeros_like(log_probs).requires_grad_(),
        mask=mask,
        training=True,
        denominator=torch.tensor(22.0),
        accumulation_steps=1,
        progress=0.0,
        extras=HeadOutputs(torch.full((2, 12, 20), -math.log(20))),
        reference_log_probs=torch.full_like(log_probs, -0.7).masked_fill(~mask, 0),
    )
    loss = ORACLES[name][0].per_token_loss(tokens)
    loss = torch.where(mask, loss, 0.0)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(log_probs.grad).all()
    assert (log_probs.grad[:, -1] == 0).all()


def test_threshold_is_inclusive_on_both_sides(record: MakeRecord) -> None:
    tokens = record(torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.long))  # p = 1/2 exactly
    for side in ("above", "below"):
        assert Threshold(0.5, side=side).per_token_loss(tokens).item() == pytest.approx(math.log(2))


def test_batch_without_a_label_is_a_finite_zero(record: MakeRecord) -> None:
    batch = draw_batch(seed=3)
    for name in ORACLES:
        empty = Batch(batch.logits, batch.labels, torch.zeros_like(batch.mask), batch.reference)
        logits = batch.logits.clone().requires_grad_()
        loss = plugin_loss(name, empty, logits, record)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert (loss == 0).all(), name
        assert (gradient == 0).all(), name


def test_bf16_logits_keep_the_gradient_to_bf16_precision(record: MakeRecord) -> None:
    batch = draw_batch(seed=4)
    rounded = Batch(batch.logits.bfloat16().double(), batch.labels, batch.mask, batch.reference)
    for name in set(ORACLES) - {"threshold-above", "threshold-below-1-p", "rho1"}:
        logits = rounded.logits.bfloat16().requires_grad_()
        # The fused head computes in fp32 from bf16 products, and gives its gradient in bf16.
        (gradient,) = torch.autograd.grad(plugin_loss(name, rounded, logits.float(), record).sum(), logits)
        exact = oracle_gradient(name, rounded)
        assert (gradient.double() - exact).norm() / exact.norm() < 1e-2, name


def test_gem_is_beta_times_nll_at_temperature_beta(record: MakeRecord) -> None:
    """Against the linear form itself: the gradient softmax(z / beta) - onehot."""
    batch = draw_batch(seed=5)
    logits = batch.logits.clone().requires_grad_()
    tokens = record(logits / 0.7, batch.labels, batch.mask)  # what the tempered head gives
    gem = GEM(0.7, h="linear")
    (gradient,) = torch.autograd.grad(torch.where(batch.mask, gem.per_token_loss(tokens), 0).sum(), logits)
    onehot = torch.nn.functional.one_hot(batch.labels, batch.logits.shape[-1])
    expected = ((batch.logits / 0.7).softmax(-1) - onehot) * batch.mask[..., None]
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("scale", [1, 3])
def test_gem_by_default_is_that_of_the_authors_scripts(scale: float, record: MakeRecord) -> None:
    """Against their loss, written out: -sum_v q_v w_v (log p_label - log p_v), w = sigmoid(0.01 (z_v - z_label))."""
    batch = draw_batch(seed=5)
    logits = (scale * batch.logits).requires_grad_()
    tokens = record(logits / 0.7, batch.labels, batch.mask)
    (gradient,) = torch.autograd.grad(torch.where(batch.mask, GEM().per_token_loss(tokens), 0).sum(), logits)

    log_p, label = logits.log_softmax(-1), batch.labels[..., None]
    q = (logits / 0.7).softmax(-1).detach()
    difference = (logits - logits.gather(-1, label)).detach()
    theirs = -(q * (0.01 * difference).sigmoid() * (log_p.gather(-1, label) - log_p)).sum(-1)
    (expected,) = torch.autograd.grad(torch.where(batch.mask, theirs, 0).sum(), logits)
    # |sigmoid(x) - 1/2 - x/4| <= |x|^3 / 48, for the weight of each v under q, and for their mean at the label.
    onehot = torch.nn.functional.one_hot(batch.labels, batch.logits.shape[-1])
    bound = (0.01 * difference.abs().amax(-1, keepdim=True)) ** 3 / 48 * (q + onehot)
    assert ((gradient - expected).abs() <= batch.mask[..., None] * (bound + 1e-15)).all()
    # A twentieth of what the weights add to half of the linear form, so that a missing term would show.
    linear = (q - onehot) * batch.mask[..., None]
    assert (gradient - expected).norm() < 0.05 * (linear / 2 - expected).norm()


def test_eaft_gate_is_the_papers_on_a_flat_tail(record: MakeRecord) -> None:
    """p = 0.9 and 2,000 equal others: the likeliest 20 tokens leave the gate closed, the whole vocabulary does not."""
    p = torch.tensor([0.9, *[0.1 / 2000] * 2000], dtype=torch.float64)
    tokens = record(p.log()[None, None], torch.ones(1, 1, dtype=torch.long))
    gates = {gate: EAFT(gate=gate).per_token_loss(tokens) / -tokens.log_probs for gate in ("top", "whole")}
    assert EAFT().gate == "top"
    assert gates["top"].item() == pytest.approx(0.0038009, abs=1e-6)
    assert gates["whole"].item() == pytest.approx(0.3622397, abs=1e-6)


def _options() -> list[Any]:
    return [
        st.builds(Power, st.floats(1e-3, 30)),
        st.builds(Focal, st.floats(0, 6)),
        st.builds(Huber, st.floats(0.01, 1)),
        st.builds(EAFT, st.integers(2, 1000), st.floats(0.1, 4), st.sampled_from(["top", "whole"])),
        st.builds(Entropy, st.floats(0, 1)),
        st.builds(IDFT, st.floats(0.01, 1), st.floats(1, 4)),
        st.builds(Threshold, st.floats(0, 1), st.sampled_from(["above", "below"]), st.sampled_from(["nll", "1-p"])),
        st.builds(PSFT, st.floats(0, 1), st.floats(0, 4)),
        st.builds(IwSFT, st.just("start"), st.floats(0.1, 4), st.floats(0.5, 32)),
        st.builds(Rho1, st.just("start"), st.floats(0.01, 1), st.sampled_from(["valid", "kept"])),
    ]


@settings(max_examples=60, deadline=None)
@given(objective=st.one_of(_options()), seed=st.integers(0, 1000))
def test_any_options_give_a_finite_gradient_towards_the_label(
    objective: Objective, seed: int, record: MakeRecord
) -> None:
    batch = draw_batch(seed)
    logits = batch.logits.float().requires_grad_()
    tokens = record(logits, batch.labels, batch.mask, reference_log_probs=batch.reference.float())
    (gradient,) = torch.autograd.grad(torch.where(batch.mask, objective.per_token_loss(tokens), 0).sum(), logits)
    assert torch.isfinite(gradient).all()
    if not isinstance(objective, Entropy):  # the bonus may pull away from a label that is already likely
        assert (gradient.gather(-1, batch.labels[..., None]) <= 1e-7).all()
