"""Scores of every engine against per-sample gradients by autograd, and against one another."""

import pytest
import torch
from tapped_passes import batch_of, losses_of, model_of, sample_gradients, tapped, trainable, whole
from trl_ext_data_regularization.engines import Direct, Ghost, Projections, Sketch, Target, derivative_scores
from trl_ext_data_regularization.layers import Batch, Layer, Use
from trl_ext_data_regularization.selection import samples_of_inputs
from trl_ext_data_regularization.visitors import ScorePass

CPU = torch.device("cpu")
kinds = pytest.mark.parametrize("kind", ["full", "tied", "lora"])


def target_gradient(model, batch):
    total = (batch["labels"][:, 1:] != -100).sum()
    grads = torch.autograd.grad(losses_of(model, batch).sum() / total, list(trainable(model).values()))
    return [g.detach() for g in grads]


def score(model, batches, make, autocast=False):
    """One scoring pass over micro-batches of one window, its forward in bf16 if so wanted."""
    parts = tapped(model)
    engine = make(parts.layers, sum(len(b["input_ids"]) for b in batches))
    offset = 0
    for batch in batches:
        here = whole(batch, offset)
        with parts.taps.active(ScorePass(engine), here):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                losses = losses_of(model, batch)
            losses.sum().backward()
        offset += here.samples
    parts.taps.remove()
    assert all(p.grad is None for p in model.parameters()), "scoring must leave no gradient behind"
    return parts.layers, engine.scores(range(len(parts.layers)))


def expected(model, batches, layers, t):
    """(L, n) and (L, n, n) from the gradients themselves."""
    rows = [g for batch in batches for g in sample_gradients(model, batch)]
    flat = lambda grads, layer: torch.cat([grads[i].flatten() for i in layer.parameters])  # noqa: E731
    G = [torch.stack([flat(row, layer) for row in rows]) for layer in layers]
    return torch.stack([g @ flat(t, layer) for g, layer in zip(G, layers, strict=True)]), torch.stack(
        [g @ g.T for g in G]
    )


def assert_agree(found, right):
    """fp32: 1e-4 of the largest score of the layer."""
    scale = right.flatten(1).abs().amax(1).view(-1, *[1] * (right.dim() - 1))
    assert float(((found - right).abs() / scale).amax()) <= 1e-4


@kinds
def test_ghost_direct_and_wide_sketch_give_the_inner_products_of_the_gradients(kind):
    model = model_of(kind)
    t = target_gradient(model, batch_of(2, 7, seed=9))
    batches = [batch_of(3, 8, seed=1), batch_of(2, 6, seed=2)]
    wide = Projections(size=512, seed=0)  # at least every width: exact
    engines = {
        "ghost": lambda layers, n: Ghost(layers, Target(t), n, CPU),
        "direct": lambda layers, n: Direct(layers, Target(t), n, CPU),
        "sketch": lambda layers, n: Sketch(layers, Target(t), n, CPU, wide),
    }
    for name, make in engines.items():
        layers, scores = score(model, batches, make)
        s, K = expected(model, batches, layers, t)
        assert_agree(scores.s, s)
        if name != "ghost":
            assert_agree(scores.K, K)


@pytest.mark.parametrize("points", [2, 4])
def test_the_difference_quotient_is_of_its_order(points):
    """In float64, where nothing is rounded away: half the step leaves a quarter of the error, or a sixteenth."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).double()
    inputs, weights = torch.randn(4, 5, dtype=torch.float64), list(net.parameters())
    t = [torch.randn_like(p) for p in weights]
    losses = lambda: net(inputs).logsumexp(1)  # noqa: E731
    rows = [torch.autograd.grad(loss, weights, retain_graph=True) for loss in losses()]
    right = torch.stack([sum((g * x).sum() for g, x in zip(row, t, strict=True)) for row in rows])
    with torch.no_grad():
        left = [derivative_scores(losses, weights, t, step, points) - right for step in (1e-2, 5e-3)]
    ratio = float(left[0].norm() / left[1].norm())
    assert ratio == pytest.approx(2**points, rel=0.05)  # the next order is 1e-4 of it


@kinds
def test_derivative_along_the_target_gives_the_global_scores(kind):
    """Within the method's own error: truncation, h^points times a derivative, and rounding of the losses, over h.

    The first is taken from a step four times as long, where rounding plays no part. A loss in fp32 is wrong by 0.1 of
    2^-23 of its size in one processor's order of summation, and by 0.3 at most in those tried; 2 are allowed.
    """
    model, batch = model_of(kind), batch_of(4, 8, seed=1)
    weights, t = list(trainable(model).values()), target_gradient(model, batch_of(2, 7, seed=9))
    before = {name: p.clone() for name, p in model.named_parameters()}
    right = torch.stack(
        [sum((g * x).sum() for g, x in zip(row, t, strict=True)) for row in sample_gradients(model, batch)]
    )

    @torch.no_grad()
    def losses():
        return losses_of(model, batch).double().sum(1)

    lengths = [torch.cat([x.detach().flatten() for x in tensors]).norm() for tensors in (weights, t)]
    rounding = 2 * torch.finfo(torch.float32).eps * losses() / (1e-3 * lengths[0].clamp(min=1) / lengths[1])
    for points in (2, 4):
        truncation = (derivative_scores(losses, weights, t, 4e-3, points) - right).abs().max() / 4**points
        found = derivative_scores(losses, weights, t, points=points)
        bound = 2 * truncation + points / 2 * rounding
        assert float(((found - right).abs() / bound).max()) <= 1
        assert float(bound.max() / right.abs().max()) <= 2e-2, "a wider bound would say nothing"
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), "parameters must come back"


def test_scores_for_several_targets_are_the_sum_over_any_split():
    model = model_of("full")
    target, batch = batch_of(4, 7, seed=9, padding=False), batch_of(3, 8, seed=1)
    parts = [{k: v[rows] for k, v in target.items()} for rows in (slice(0, 1), slice(1, 4))]
    sums = []
    for piece in [target, *parts]:
        t = [g * len(piece["input_ids"]) for g in target_gradient(model, piece)]  # equal lengths: a sum of means
        sums.append(score(model, [batch], lambda layers, n, t=t: Ghost(layers, Target(t), n, CPU))[1].s)
    assert_agree(sums[1] + sums[2], sums[0])


def test_samples_of_a_packed_row_are_told_apart():
    """Padding-free: two samples in one row, told apart by position; each score as if the sample were alone."""
    model = model_of("full")
    model.config._attn_implementation = "eager"
    t = target_gradient(model, batch_of(2, 7, seed=9))
    lengths, parts = (5, 4), tapped(model)
    index = torch.repeat_interleave(torch.arange(2), torch.tensor(lengths)).unsqueeze(0)
    row = batch_of(1, sum(lengths), seed=4)
    row["position_ids"] = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    del row["attention_mask"]
    row["labels"][row["position_ids"] == 0] = -100
    engine = Ghost(parts.layers, Target(t), 2, CPU)
    with parts.taps.active(ScorePass(engine), Batch(index, 2, 0, False)):
        losses_of(model, row).sum().backward()
    parts.taps.remove()
    alone, start = [], 0
    for length in lengths:
        piece = {k: v[:, start : start + length] for k, v in row.items()}
        grads = torch.autograd.grad(losses_of(model, piece).sum(), list(model.parameters()))
        alone.append(torch.stack([(g * x).sum() for g, x in zip(grads, t, strict=True)]))
        start += length
    by_layer = [[sum(a[i] for i in layer.parameters) for a in alone] for layer in parts.layers]
    assert_agree(engine.scores(range(len(parts.layers))).s, torch.tensor(by_layer))


def test_sketches_are_unbiased_over_seeds():
    model = model_of("lora")
    t = target_gradient(model, batch_of(2, 7, seed=9))
    batch = batch_of(3, 8, seed=1)
    exact = score(model, [batch], lambda layers, n: Direct(layers, Target(t), n, CPU))[1]
    seeds = 60
    drawn = [
        score(model, [batch], lambda layers, n, seed=seed: Sketch(layers, Target(t), n, CPU, Projections(8, seed)))[1]
        for seed in range(seeds)
    ]
    for name in ("s", "K"):
        values = torch.stack([getattr(scores, name) for scores in drawn])
        error = (values.mean(0) - getattr(exact, name)).abs()
        spread = values.std(0) / seeds**0.5
        # 4 standard errors: among some 200 numbers, one beyond is a 1 % event. Layers no wider than 8 are exact.
        assert (error <= 4 * spread + 1e-4 * getattr(exact, name).abs().max()).all()


@pytest.mark.parametrize("engine", ["ghost", "direct", "sketch"])
@pytest.mark.parametrize("kind", ["linear", "embedding", "scale"])
def test_in_bf16_scores_are_summed_in_fp32(engine, kind):
    """A thousand equal tokens: a sum of ones in bf16 would stop at 256."""
    tokens, width = 1000, 4
    module = torch.nn.Embedding(width, width) if kind == "embedding" else torch.nn.Linear(width, width, bias=False)
    use = Use("layer", module, kind, 0)
    t = torch.ones(width) if kind == "scale" else torch.ones(width, width)
    layers, ones = [Layer("layer", 0, None, 1)], torch.ones(tokens, width, dtype=torch.bfloat16)
    made = {
        "ghost": lambda: Ghost(layers, Target([t]), 1, CPU),
        "direct": lambda: Direct(layers, Target([t]), 1, CPU),
        "sketch": lambda: Sketch(layers, Target([t]), 1, CPU, Projections(8, 0)),
    }[engine]()
    x = {"linear": ones, "embedding": torch.zeros(tokens, dtype=torch.long), "scale": None}[kind]
    index = torch.zeros(tokens, dtype=torch.long)
    made.add(use, x, ones, index, Batch(index.unsqueeze(0), 1, 0, True))
    scores = made.scores([0])
    assert scores.s.dtype == torch.float32
    assert scores.s.item() == tokens * width * (width if kind == "linear" else 1)


def test_a_forward_in_bf16_gives_nearly_the_same_scores():
    model, batch = model_of("full"), batch_of(3, 64, seed=1, padding=False)
    t = target_gradient(model, batch_of(2, 7, seed=9))
    runs = [
        score(model, [batch], lambda layers, n: Ghost(layers, Target(t), n, CPU), autocast=a)[1].s
        for a in (False, True)
    ]
    assert runs[1].dtype == torch.float32
    error = (runs[1] - runs[0]).abs() / runs[0].abs().amax(1, keepdim=True)
    assert error.mean() <= 0.03  # 2^-8 an operation, and some ten of them one after the other


def test_padding_at_the_end_of_a_packed_row_is_no_sample():
    """Positions of 0 there would count as samples without labels, of which top-k keeps some."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 0]])
    labels = torch.tensor([[-100, 5, 5, -100, 5, -100, -100, -100]])
    batch, tokens = samples_of_inputs({"labels": labels, "position_ids": positions, "input_ids": labels})
    assert batch.samples == 2
    assert batch.index.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1]]
    assert tokens.tolist() == [2, 1]
