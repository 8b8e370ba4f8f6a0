"""The pass over two LM heads against autograd on whole logits in fp64, on CPU by both ways to fold a tile."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trl_ext_objectives import two_heads
from trl_ext_objectives.two_heads import Head, nll_and_kl

from trl_ext import SFTConfig, SFTTrainer, hookimpl
from trl_ext.errors import PluginError
from trl_ext.records import SampleWeights, Window
from trl_ext.testing import Addition, save_model, tiny_llama, tiny_tokenizer

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]
TOKENS, VOCABULARY, WIDTH, REF_WIDTH = 300, 1100, 24, 40  # two tiles of tokens on CPU, and blocks of TRL's kernels
ROUNDING = {torch.float32: 5e-6, torch.bfloat16: 1e-2}  # the gradient of the logits is rounded to bf16's eight bits


def draw(device: str = "cpu", tokens: int = TOKENS, bias: bool = True) -> tuple[Head, Head, Tensor, Tensor]:
    """Both heads in fp32, labels, and the weights of the NLL."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    own, other = (
        Head(normal(tokens, width), normal(VOCABULARY, width) / 4, normal(VOCABULARY) if bias else None)
        for width in (WIDTH, REF_WIDTH)
    )
    labels = torch.randint(VOCABULARY, (tokens,), generator=generator).to(device)
    return own, other, labels, torch.rand(tokens, generator=generator).to(device)


def whole_logits(
    own: Head, other: Head, labels: Tensor, nll_weights: Tensor, kl_weight: float, upstream: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The loss by its formula, and its gradients by the parts of `own`, in fp64."""
    parts = [None if x is None else x.detach().double().requires_grad_() for x in own]
    fixed = [None if x is None else x.double() for x in other]
    log_p, log_q = (torch.nn.functional.linear(*head).log_softmax(-1) for head in (parts, fixed))
    nll = -log_p.gather(1, labels[:, None])[:, 0]
    loss = nll_weights.double() * nll + kl_weight * (log_q.exp() * (log_q - log_p)).sum(1)
    (loss * upstream.double()).sum().backward()
    return loss.detach(), [x.grad for x in parts if x is not None]


def compare(found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]], tolerance: float) -> None:
    for mine, exact in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        assert (mine.double() - exact).norm() <= tolerance * exact.norm()


def trained(own: Head, *others: Any, upstream: Tensor) -> tuple[Tensor, list[Tensor]]:
    parts = Head(*(None if x is None else x.clone().requires_grad_() for x in own))
    loss = nll_and_kl(parts, *others)
    (loss * upstream).sum().backward()
    return loss.detach(), [x.grad for x in parts if x is not None]


FOLDS = pytest.mark.parametrize("fold", ["_torch_tile", "_kernel_tile"])


@FOLDS
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("upstream", ["one for all tokens", "one for each"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_loss_and_gradients_are_those_of_whole_logits(
    fold: str, device: str, dtype: torch.dtype, upstream: str, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(two_heads, "_torch_tile", getattr(two_heads, fold))
    monkeypatch.setattr(two_heads, "_kernel_tile", getattr(two_heads, fold))
    own, other, labels, nll_weights = draw(device, bias=bias)
    # As numbers that bf16 has, so that both start from the same ones.
    own, other = (Head(*(None if x is None else x.to(dtype).float() for x in head)) for head in (own, other))
    factors = torch.full_like(nll_weights, 0.02) if upstream == "one for all tokens" else nll_weights.flip(0) - 0.3
    expected = whole_logits(own, other, labels, nll_weights, 0.4, factors)
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        found = trained(own, other, labels, nll_weights, 0.4, upstream=factors)
    compare(found, expected, ROUNDING[dtype])


@FOLDS
@pytest.mark.parametrize("kl_weight", [0.0, 2.0])
def test_a_term_without_weight_leaves_the_other(fold: str, kl_weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of 0 are logarithms of -inf to the kernels."""
    monkeypatch.setattr(two_heads, "_torch_tile", getattr(two_heads, fold))
    own, other, labels, nll_weights = draw()
    nll_weights[:100] = 0
    upstream = torch.ones(TOKENS)
    expected = whole_logits(own, other, labels, nll_weights, kl_weight, upstream)
    compare(trained(own, other, labels, nll_weights, kl_weight, upstream=upstream), expected, 5e-6)


def test_a_model_that_is_its_reference_has_no_divergence() -> None:
    own, _, labels, nll_weights = draw()
    loss, gradients = trained(own, own, labels, torch.zeros_like(nll_weights), 1.0, upstream=torch.ones(TOKENS))
    assert loss.abs().max() < 1e-6
    assert all(gradient.abs().max() < 1e-4 for gradient in gradients)  # fp32: p - p_ref, summed over all tokens


def test_autocast_does_not_round_the_terms_of_a_small_divergence() -> None:
    """They cancel to 2e-4 nats a token: with terms in bf16 that is wrong by 2 %, in fp32 by 0.07 %."""
    own, _, labels, nll_weights = draw()
    noise = torch.randn(own.hidden.shape, generator=torch.Generator().manual_seed(1)) / 64
    both = own, own._replace(hidden=own.hidden + noise)
    own, other = (Head(*(x.bfloat16().float() for x in head)) for head in both)
    others, upstream = (other, labels, torch.zeros_like(nll_weights), 1.0), torch.ones(TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        compare(trained(own, *others, upstream=upstream), whole_logits(own, *others, upstream), 4e-3)


def test_a_frozen_head_gets_no_gradient_and_is_no_reason_for_a_second_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the hidden states follows any weights of the tokens."""
    passes = count_passes(monkeypatch)
    own, other, labels, nll_weights = draw()
    hidden, upstream = own.hidden.clone().requires_grad_(), nll_weights.flip(0)
    loss = nll_and_kl(own._replace(hidden=hidden), other, labels, nll_weights, 0.4)
    (loss * upstream).sum().backward()
    exact, (gradient, *_) = whole_logits(own, other, labels, nll_weights, 0.4, upstream)
    compare((loss.detach(), [hidden.grad]), (exact, [gradient]), 5e-6)
    assert own.weight.grad is None
    assert len(passes) == 1


def test_batch_without_a_label_has_gradients_of_zero() -> None:
    own, other, labels, nll_weights = draw(tokens=0)
    loss, gradients = trained(own, other, labels, nll_weights, 0.4, upstream=torch.ones(0))
    assert loss.shape == (0,)
    assert all((gradient == 0).all() for gradient in gradients)


def test_a_second_backward_pass_gives_the_same_gradients() -> None:
    own, other, labels, nll_weights = draw()
    parts = Head(*(x.clone().requires_grad_() for x in own))
    loss = nll_and_kl(parts, other, labels, nll_weights, 0.4).sum()
    first = torch.autograd.grad(loss, parts, retain_graph=True)
    torch.testing.assert_close(first, torch.autograd.grad(loss, parts), rtol=1e-5, atol=1e-5)


def test_nothing_is_kept_for_a_gradient_where_none_is_taken() -> None:
    own, other, labels, nll_weights = draw()
    with torch.no_grad():
        loss = nll_and_kl(Head(*(x.requires_grad_() for x in own)), other, labels, nll_weights, 0.4)
    assert loss.grad_fn is None
    exact, _ = whole_logits(own, other, labels, nll_weights, 0.4, torch.ones(TOKENS))
    compare((loss, []), (exact, []), 5e-6)


def count_passes(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Notes each pass over the heads."""
    passes: list[None] = []
    inner: Callable[..., Any] = two_heads._pass

    def counted(*args: Any, **kwargs: Any) -> Any:
        passes.append(None)
        return inner(*args, **kwargs)

    monkeypatch.setattr(two_heads, "_pass", counted)
    return passes


def test_a_second_pass_does_not_keep_the_gradients_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a head is as large as its weight, in fp32."""
    made: list[weakref.ref[Tensor]] = []
    inner: Callable[..., Any] = two_heads._pass

    def noted(*args: Any, **kwargs: Any) -> Any:
        assert all(gradient() is None for gradient in made)
        loss, gradients = inner(*args, **kwargs)
        made.extend(weakref.ref(gradient) for gradient in gradients)
        return loss, gradients

    monkeypatch.setattr(two_heads, "_pass", noted)
    own, other, labels, nll_weights = draw()
    trained(own, other, labels, nll_weights, 0.4, upstream=nll_weights.flip(0))
    assert len(made) == 6


class Uneven:
    """Weighs the samples of a window apart."""

    @hookimpl
    def sample_weights(self, window: Window) -> SampleWeights:
        return SampleWeights(torch.arange(1.0, window.num_samples + 1), "tokens")


def asft_trainer(folder: Path, asft: str, plugins: Sequence[Any] = ()) -> SFTTrainer:
    return SFTTrainer(
        model=tiny_llama(hidden=16, layers=1),
        args=SFTConfig(
            str(folder), plugins=[asft], max_steps=2, bf16=False, use_cpu=True, report_to="none", save_strategy="no"
        ),
        train_dataset=Addition(digits=2).dataset(16),
        processing_class=tiny_tokenizer(),
        plugins=list(plugins),
    )


@pytest.mark.parametrize(("plugins", "expected"), [([], 2), ([Uneven()], 4)], ids=["plain", "weighted samples"])
def test_a_step_of_asft_takes_one_pass_and_with_weighted_samples_two(
    plugins: list[Any], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = count_passes(monkeypatch)
    asft_trainer(tmp_path, "asft", plugins).train()
    assert len(passes) == expected


def test_a_reference_that_caps_its_logits_is_refused(tmp_path: Path) -> None:
    """As Gemma 2 would be beside Gemma, whose vocabulary is the same: the products of its head are not its logits."""
    other = tiny_llama(hidden=16, layers=1)
    other.config.final_logit_softcapping = 30.0
    path = save_model(other, tiny_tokenizer(), tmp_path / "other")
    with pytest.raises(PluginError, match=r"asft does not support .* final_logit_softcapping .*take another reference"):
        asft_trainer(tmp_path / "run", f"asft:reference=model:{path}").train()
