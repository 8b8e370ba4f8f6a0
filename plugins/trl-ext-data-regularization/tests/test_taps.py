"""Weighted backward passes: each layer's gradient is the weighted sum of its samples' gradients."""

import pytest
import torch
from tapped_passes import batch_of, losses_of, model_of, sample_gradients, tapped, trainable, whole
from trl.trainer.utils import add_fused_lm_head
from trl_ext_data_regularization.engines import Ghost, Target
from trl_ext_data_regularization.layers import Batch
from trl_ext_data_regularization.solvers import RULES, Problem, Rule
from trl_ext_data_regularization.visitors import Choice, ScorePass, WeightedPass

# Weights of four samples, whether those not zero are equal, and their number where it is told.
CHOICES = {
    "some kept, counted": ([0.0, 2.0, 2.0, 0.0], True, 2),
    "some kept": ([0.0, 2.0, 0.0, 2.0], True, None),
    "unequal": ([0.5, 0.0, -1.5, 2.0], False, None),
    "all kept": ([1.0, 1.0, 1.0, 1.0], True, 4),
    "none kept": ([0.0, 0.0, 0.0, 0.0], True, 0),
    "next to nothing": ([1e-31, 0.0, 1e-45, 3e-38], False, None),
    "large and small": ([1e6, 1e-31, 0.0, 1e-3], False, None),
    "counted, and zero": ([0.0, 0.0, 0.0, 0.0], True, 2),
}


def weighted_gradients(model, batch, weights, choice, by_row=True):
    """Parameter gradients after a pass in which each layer has its own weights, rotated by its position."""
    parts = tapped(model)
    here = whole(batch)
    here = here if by_row else Batch(here.index, here.samples, here.offset, False)

    def choose(layer: int, _: Batch) -> Choice:
        _, equal, count = choice
        return Choice(weights.roll(layer), equal, count)

    with parts.taps.active(WeightedPass(choose), here):
        losses_of(model, batch).sum().backward()
    parts.taps.remove()
    return parts.layers, [p.grad for p in trainable(model).values()]


@pytest.mark.parametrize("case", CHOICES)
@pytest.mark.parametrize("kind", ["full", "tied", "lora"])
def test_each_layers_gradient_is_the_weighted_sum_of_its_samples(kind, case):
    model, batch = model_of(kind), batch_of(4, 8, seed=1)
    weights = torch.tensor(CHOICES[case][0])
    samples = sample_gradients(model, batch)
    layers, found = weighted_gradients(model, batch, weights, CHOICES[case])
    for position, layer in enumerate(layers):
        for i in layer.parameters:
            right = sum(w * sample[i] for w, sample in zip(weights.roll(position), samples, strict=True))
            got = torch.zeros_like(right) if found[i] is None else found[i]
            scale = max(float(sample[i].abs().max()) for sample in samples) * max(float(weights.abs().max()), 1e-6)
            assert (got - right).abs().max() <= 1e-4 * scale, layer.name


@pytest.mark.parametrize("case", ["some kept", "unequal"])
def test_without_rows_of_their_own_samples_are_scaled(case):
    """As where several samples share a row: nothing can be left out, and the gradient is the same."""
    batch, weights = batch_of(4, 8, seed=1), torch.tensor(CHOICES[case][0])
    by_row = weighted_gradients(model_of("full"), batch, weights, CHOICES[case])[1]
    scaled = weighted_gradients(model_of("full"), batch, weights, CHOICES[case], by_row=False)[1]
    for a, b in zip(by_row, scaled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_keeps_as_many_as_it_says(name):
    generator = torch.Generator().manual_seed(0)
    for n in range(1, 9):
        G, t = torch.randn(n, 12, generator=generator), torch.randn(12, generator=generator)
        problem = Problem((G @ t).double(), torch.randint(1, 9, (n,), generator=generator), (G @ G.T).double())
        rule = Rule(name, 0.5)
        weights = rule.solve(problem, (t @ t).double(), 0.1).weights
        kept = weights[weights != 0]
        assert rule.kept(n) in (None, len(kept))
        if rule.equal and len(kept):
            torch.testing.assert_close(kept, kept[:1].expand_as(kept))
    assert (Rule(name, 0.5).kept(8) is None) == (name not in ("full", "target", "topk", "second-order"))


def test_a_head_that_scales_its_logits_is_refused_at_the_first_labels():
    """A batch without labels, as a rank may begin with, shows nothing of the head."""
    model, batch = model_of("full"), batch_of(4, 8, seed=1)
    model.config.logit_scale = 20.0
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    parts = tapped(model)
    engine = Ghost(parts.layers, Target([None] * len(trainable(model))), 4, torch.device("cpu"))
    without = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    with parts.taps.active(ScorePass(engine), whole(batch)):
        losses_of(model, without).sum().backward()
    with parts.taps.active(ScorePass(engine), whole(batch)), pytest.raises(RuntimeError, match="scales or caps"):
        losses_of(model, batch).sum().backward()
