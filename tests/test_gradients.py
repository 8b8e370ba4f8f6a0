"""Gradient views against arithmetic on one flat vector in double precision, and in a real run before clipping."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import Nll, Plugin, assert_equal_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from trl_ext import hookimpl
from trl_ext.gradients import GradientView, conflict_weight, named_parameters, pcgrad_weights, trainable_parameters
from trl_ext.testing.runs import MAKE, additions, lora, make_sft, parameters, tiny_model

SHAPES = [(3, 4), (5,), (), (2, 1, 3)]
# Sums of n = 25 fp32 products of size 1: the error is at most n x 6e-8 x the sum of their sizes, 4e-5.
FP32 = {"rtol": 1e-5, "atol": 1e-5}


def view(
    seed: int, missing: tuple[int, ...] = (), dtype: torch.dtype = torch.float32, live: bool = False
) -> GradientView:
    """A view of four parameters with random gradients; those in `missing` have none."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    tensors = [None if i in missing else t for i, t in enumerate(made)]
    params = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
    names = [f"p{i}" for i in range(len(SHAPES))]
    if not live:
        return GradientView(names, params, tensors)
    for p, t in zip(params, tensors, strict=True):
        p.grad = t
    return GradientView(names, params)


def flat(gradients: GradientView) -> Tensor:
    """(n,) double: the oracle's picture of a view, no gradient being zero."""
    parts = [
        torch.zeros(p.shape) if t is None else t for p, t in zip(gradients.parameters, gradients.tensors, strict=True)
    ]
    return torch.cat([part.double().flatten() for part in parts])


missing_sets = st.sets(st.integers(0, len(SHAPES) - 1)).map(lambda s: tuple(sorted(s)))
factors = st.floats(-4, 4, allow_nan=False, width=32)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 99), st.integers(100, 199), missing_sets, missing_sets)
def test_scalars_are_those_of_the_flat_vector(seed, other_seed, missing, other_missing):
    a, b = view(seed, missing), view(other_seed, other_missing)
    x, y = flat(a), flat(b)
    for scalar in (a.dot(b), a.norm(), a.squared_norm(), a.cosine(b)):
        assert scalar.dtype == torch.float32
        assert scalar.shape == ()
    torch.testing.assert_close(a.dot(b).double(), x @ y, **FP32)
    torch.testing.assert_close(a.norm().double(), x.norm(), **FP32)
    torch.testing.assert_close(a.squared_norm().double(), x @ x, **FP32)
    lengths = x.norm() * y.norm()
    torch.testing.assert_close(a.cosine(b).double(), x @ y / lengths if lengths > 0 else x @ y, **FP32)
    assert a.dots(b).shape == (len(SHAPES),)
    torch.testing.assert_close(a.dots(b).sum(), a.dot(b))
    assert a.grams(b).shape == (len(SHAPES), 2, 2)
    both = torch.stack([x, y])
    torch.testing.assert_close(a.grams(b).sum(0).double(), both @ both.t(), **FP32)
    torch.testing.assert_close(a.grams(b)[:, 0, 1], a.dots(b), rtol=0, atol=0)


@pytest.mark.parametrize("live", [False, True], ids=["snapshot", "live"])
@settings(deadline=None, max_examples=40)
@given(st.integers(0, 99), st.integers(100, 199), missing_sets, missing_sets, factors, st.booleans())
def test_updates_are_those_of_the_flat_vector(live, seed, other_seed, missing, other_missing, factor, as_tensor):
    a, b = view(seed, missing, live=live), view(other_seed, other_missing)
    x, y = flat(a), flat(b)
    given_factor = torch.tensor(factor) if as_tensor else factor
    assert a.axpy_(given_factor, b) is a
    torch.testing.assert_close(flat(a), x + factor * y, **FP32)
    assert a.mul_(given_factor) is a
    torch.testing.assert_close(flat(a), factor * (x + factor * y), rtol=1e-5, atol=1e-5)
    assert a.copy_(b) is a
    torch.testing.assert_close(flat(a), y, rtol=0, atol=0)
    torch.testing.assert_close(flat(b), y, rtol=0, atol=0)


@pytest.mark.parametrize("missing", [(), (1, 3), (0, 1, 2, 3)])
def test_a_live_view_is_the_gradient_and_a_clone_is_not(missing):
    live = view(1, missing, live=True)
    snapshot = live.clone()
    before = flat(live)
    live.mul_(2)
    for p, t in zip(live.parameters, live.tensors, strict=True):
        assert (p.grad is None) == (t is None)
        if t is not None:
            assert p.grad.data_ptr() == t.data_ptr()
    torch.testing.assert_close(flat(live), 2 * before, rtol=0, atol=0)
    torch.testing.assert_close(flat(snapshot), before, rtol=0, atol=0)
    live.parameters[0].grad = torch.ones(SHAPES[0])
    assert torch.equal(live.tensors[0], torch.ones(SHAPES[0]))
    snapshot.mul_(0)
    assert flat(live).norm() > 0


def test_a_gradient_is_made_where_there_was_none():
    live = view(1, missing=(2,), live=True)
    live.axpy_(0.5, view(2))
    assert torch.equal(live.parameters[2].grad, 0.5 * view(2).tensors[2])
    snapshot = view(1, missing=(2,))
    snapshot.axpy_(0.5, view(2))
    assert torch.equal(snapshot.tensors[2], 0.5 * view(2).tensors[2])
    assert snapshot.parameters[2].grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_are_summed_in_fp32(dtype):
    """In bf16 the sum of ones stops at 256: one more is less than half a digit."""
    n = 5000
    p = nn.Parameter(torch.zeros(n, dtype=dtype))
    ones = GradientView(["p"], [p], [torch.ones(n, dtype=dtype)])
    assert float(ones.dot(ones)) == n
    assert float(ones.squared_norm()) == pytest.approx(n, rel=1e-6)
    assert float(ones.cosine(ones)) == pytest.approx(1, rel=1e-6)
    assert ones.tensors[0].dtype == dtype
    ones.axpy_(2.0, ones.clone())
    assert float(ones.dot(ones)) == 9 * n
    assert ones.tensors[0].dtype == dtype


def test_mixed_dtypes_keep_their_own():
    params = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))]
    tensors = [torch.full((4,), 1.5), torch.full((4,), 0.5, dtype=torch.bfloat16)]
    a = GradientView(["a", "b"], params, [t.clone() for t in tensors])
    single = GradientView(["a", "b"], params, [torch.ones(4), torch.ones(4)])
    assert float(a.squared_norm()) == pytest.approx(4 * 2.25 + 4 * 0.25)
    for factor in (2.0, torch.tensor(2.0)):
        b = a.clone().axpy_(factor, single)
        assert [t.dtype for t in b.tensors] == [torch.float32, torch.bfloat16]
        assert float(b.tensors[0][0]) == 3.5
        assert float(b.tensors[1][0]) == 2.5


def test_a_factor_keeps_its_precision_beside_low_precision_gradients():
    params = [nn.Parameter(torch.zeros(4, dtype=torch.bfloat16)), nn.Parameter(torch.zeros(4))]
    ones = GradientView(["a", "b"], params, [torch.ones(4, dtype=torch.bfloat16), torch.ones(4)])
    for factor in (0.1, torch.tensor(0.1)):
        b = ones.clone().axpy_(factor, ones)
        assert float(b.tensors[1][0]) == pytest.approx(1.1, rel=1e-6)
        b = ones.clone().mul_(factor)
        assert float(b.tensors[1][0]) == pytest.approx(0.1, rel=1e-6)


def test_norms_of_tiny_gradients():
    p = nn.Parameter(torch.zeros(2))
    tiny = GradientView(["p"], [p], [torch.full((2,), 1e-15)])
    assert float(tiny.norm()) == pytest.approx(2**0.5 * 1e-15, rel=1e-3)
    zero = GradientView(["p"], [p], [torch.zeros(2)])
    assert float(zero.cosine(tiny)) == 0
    assert float(zero.norm()) == 0


def test_frozen_and_tied_parameters():
    model = tiny_model(tie=True)
    names = list(trainable_parameters(model))
    assert "lm_head.weight" not in names
    assert "model.embed_tokens.weight" in names
    model.model.embed_tokens.weight.requires_grad_(False)
    assert "model.embed_tokens.weight" not in trainable_parameters(model)


# -- two gradients that conflict -------------------------------------------------------------------------------------


def conflicting_pairs() -> Tensor:
    """(20, 2, 6) double: pairs (a, b) of very different lengths, the first ten of which conflict."""
    pairs = torch.randn(20, 2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    signs = torch.where((pairs[:, 0] * pairs[:, 1]).sum(-1) > 0, 1.0, -1.0)
    signs[:10] *= -1
    pairs[:, 1] *= (signs * torch.logspace(-4, 4, 20, dtype=torch.float64)).unsqueeze(1)
    return pairs


def test_adding_the_conflict_weight_gives_the_nearest_vector_that_does_not_oppose():
    """By the conditions of a projection onto {u : <u, b> >= 0}: feasible, and moved along b only where it must be."""
    for i, (a, b) in enumerate(conflicting_pairs()):
        weight = conflict_weight(a @ b, b @ b)
        if i < 10:
            assert weight > 0
            assert abs((a + weight * b) @ b) <= 1e-12 * a.norm() * b.norm()
        else:
            assert weight == 0


def test_pcgrad_is_the_sum_of_each_without_what_points_against_the_other():
    """Algorithm 1 of arXiv:2001.06782, step by step on the vectors themselves."""

    def projected(mine: Tensor, other: Tensor) -> Tensor:
        return mine - (mine @ other) / (other @ other) * other if mine @ other < 0 else mine

    pairs = conflicting_pairs()
    weights = pcgrad_weights(pairs @ pairs.mT)  # all at once
    assert weights.shape == (20, 2)
    assert torch.equal(weights[10:], torch.ones(10, 2, dtype=torch.float64))
    for (a, b), (w_a, w_b) in zip(pairs, weights, strict=True):
        torch.testing.assert_close(w_a * a + w_b * b, projected(a, b) + projected(b, a), rtol=1e-12, atol=1e-12)


def test_a_zero_gradient_conflicts_with_nothing_and_nan_stays_nan():
    zero = torch.zeros(2, 2)
    zero[0, 0] = 3.0
    assert pcgrad_weights(zero).tolist() == [1.0, 1.0]
    assert conflict_weight(torch.tensor(0.0), torch.tensor(0.0)) == 0
    assert pcgrad_weights(torch.full((2, 2), torch.nan)).isnan().all()


# -- in a run --------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Look(Plugin):
    factor: float = 1.0
    norms: list[float] = field(default_factory=list)
    flats: list[Tensor] = field(default_factory=list)
    names: tuple[str, ...] = ()

    @hookimpl
    def gradients_ready(self, gradients):
        self.norms.append(float(gradients.norm()))
        self.flats.append(flat(gradients))
        self.names = gradients.names
        gradients.mul_(self.factor)


@pytest.mark.parametrize("kind", MAKE)
def test_edits_come_before_clipping(tmp_path, kind):
    """A gradient scaled by 1000 is clipped to the same step; scaled below the threshold it is not clipped."""
    finals = {}
    for factor in (1.0, 1000.0):
        config = {"max_grad_norm": 1e-3, "optim": "sgd", "learning_rate": 1.0, "max_steps": 1}
        trainer = MAKE[kind](tmp_path / "run", plugins=[Look(factor)], **config)
        trainer.train()
        finals[factor] = trainer.state.log_history[0]["grad_norm"], parameters(trainer)
    assert finals[1000.0][0] == pytest.approx(1000 * finals[1.0][0], rel=1e-4)
    for name, p in finals[1.0][1].items():
        # The clipped step is g / (|g| + 1e-6): a relative difference of 1e-6 / |g|.
        torch.testing.assert_close(finals[1000.0][1][name], p, rtol=0, atol=1e-7)


def test_a_zeroed_gradient_leaves_the_weights(tmp_path):
    trainer = make_sft(tmp_path, plugins=[Look(0.0)], max_steps=3)
    start = parameters(trainer)
    trainer.train()
    assert all(torch.equal(p, start[name]) for name, p in parameters(trainer).items())


def test_the_view_is_the_whole_windows_gradient(tmp_path):
    """Against autograd on full logits: the mean NLL over all label tokens of the window."""
    look = Look()
    trainer = make_sft(tmp_path, plugins=[look], max_steps=1, gradient_accumulation_steps=3)
    batches: list[Any] = []
    original = trainer.get_batch_samples

    def noting(*args: Any) -> Any:
        samples, items = original(*args)
        batches.extend(samples)
        return samples, items

    trainer.get_batch_samples = noting
    trainer.train()
    model = tiny_model().double()
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        labels = batch["labels"][:, 1:]
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        total = total + nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="sum")
        tokens += int((labels != -100).sum())
    (total / tokens).backward()
    expected = torch.cat([p.grad.flatten() for p in trainable_parameters(model).values()])
    assert len(batches) == 3
    assert len(look.flats) == 1
    torch.testing.assert_close(look.flats[0], expected, rtol=0, atol=2e-6)  # fp32 against fp64


def test_only_adapters_are_in_the_view(tmp_path):
    look = Look()
    trainer = make_sft(tmp_path, plugins=[look], max_steps=1, trainer={"peft_config": lora()})
    trainer.train()
    assert look.names
    assert all("lora_" in name for name in look.names)
    assert set(look.names) == set(trainable_parameters(trainer.model))


def test_frozen_parameters_are_not_in_the_view(tmp_path):
    model = tiny_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    look = Look()
    trainer = make_sft(tmp_path, plugins=[look, Nll()], model=model, train=additions(8), max_steps=1)
    trainer.train()
    assert look.names == tuple(trainable_parameters(model))
    assert "model.embed_tokens.weight" not in look.names


# -- wrappers --------------------------------------------------------------------------------------------------------


def checkpointed(model: Any) -> Any:
    """As FSDP's activation checkpointing has it: a wrapper around each layer, whose name enters those of parameters."""
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    return model


def compiled(model: Any) -> Any:
    model.model.layers[0].mlp = torch.compile(model.model.layers[0].mlp)
    return torch.compile(model)


@pytest.mark.parametrize("wrap", [checkpointed, compiled, nn.DataParallel], ids=["checkpointing", "compile", "data"])
def test_names_are_those_of_the_bare_model_whatever_wraps_it(wrap):
    model = tiny_model()
    names = [name for name, _ in model.named_parameters()]
    wrapped = wrap(model)
    assert [name for name, _ in wrapped.named_parameters()] != names
    assert list(named_parameters(wrapped)) == names


def test_state_saved_without_activation_checkpointing_resumes_with_it(tmp_path):
    finals = []
    for model, checkpoint in ((tiny_model(), None), (checkpointed(tiny_model()), str(tmp_path / "run/checkpoint-2"))):
        config = {"names": ["ema:decay=0.5"], "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        trainer = make_sft(tmp_path / "run", model=model, **config)
        trainer.train(resume_from_checkpoint=checkpoint)
        finals.append(dict(zip(trainer.ext_weights.names, trainer.ext_weights.local(), strict=True)))
    assert_equal_bits(finals[1], finals[0])
