"""Mean-gradient surgery: closed forms against geometry, and the plugin against the two gradients by autograd."""

import pytest
import torch
from short_runs import GENERAL, TARGET, train
from trl_ext_data_regularization.gradient_surgery import GradientSurgery
from trl_ext_data_regularization.weightings import CLOSED_FORMS, TORCHJD, half_space, weighting

from trl_ext.gradients import GradientView, pcgrad_weights
from trl_ext.options import check_options
from trl_ext.records import StreamGradient


def pair(seed: int, angle_sign: float):
    """t and g in R^6 with an inner product of the given sign."""
    generator = torch.Generator().manual_seed(seed)
    t, g = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    return t, g if float(t @ g) * angle_sign > 0 else -g


def gram(t, g):
    rows = torch.stack([t, g])
    return rows @ rows.T


@pytest.mark.parametrize("seed", range(5))
def test_half_space_is_the_nearest_vector_that_does_not_oppose_the_general_gradient(seed):
    t, g = pair(seed, -1)
    a, b = half_space(gram(t, g))
    u = a * t + b * g
    assert abs(float(u @ g)) < 1e-12
    for step in torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)):
        v = u + 0.1 * step
        if float(v @ g) >= 0:
            assert (v - t).norm() >= (u - t).norm() - 1e-12
    t, g = pair(seed, 1)
    assert half_space(gram(t, g)).tolist() == [1.0, 0.0]


def test_a_zero_gradient_conflicts_with_nothing():
    zero, t = torch.zeros(6), torch.randn(6)
    for function in CLOSED_FORMS.values():
        for pair_ in ((t, zero), (zero, t)):
            assert torch.isfinite(function(gram(*pair_))).all()


@pytest.mark.parametrize("name", TORCHJD)
def test_weightings_of_torchjd_are_offered(name):
    pytest.importorskip("torchjd", reason="an optional extra")
    if name in ("upgrad", "dualproj"):
        pytest.importorskip("quadprog", reason="torchjd's projector needs it")
    function = weighting(name)
    grams = torch.stack([gram(*pair(seed, -1)) for seed in range(3)]).float()
    together = function(grams)
    assert together.shape == (3, 2)
    torch.testing.assert_close(together, torch.stack([function(one) for one in grams]))
    if name in ("upgrad", "mgda", "dualproj"):  # these promise a direction that neither gradient opposes
        for weights, one in zip(together, grams, strict=True):
            # torchjd adds 1e-4 to the normalised Gram matrix
            assert (one @ weights >= -2e-3 * one.diagonal()).all()


STEP = {
    "optim": "sgd",
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "max_steps": 1,
    "per_device_train_batch_size": 8,
}


@pytest.mark.parametrize(
    ("scope", "general"),
    [
        ("global", "stream"),
        ("layer", "train"),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in (("layer", "stream"), ("global", "train"))),
    ],
)
def test_the_plugin_combines_the_two_gradients(scope, general):
    """t and g are the updates of plain SGD on each data set alone; signs are flipped by data that disagree."""
    targets, generals = TARGET.select(range(4)), GENERAL.select(range(8))
    plain = {
        "t": train(data=targets, **STEP),
        "g": train(data=generals, **STEP),
        "0": train(data=targets, **{**STEP, "learning_rate": 0.0}),
    }
    t, g = (
        [
            a.detach() - b.detach()
            for a, b in zip(plain["0"].model.parameters(), plain[k].model.parameters(), strict=True)
        ]
        for k in "tg"
    )
    own, stream, size = (
        (targets, {"general": generals}, 8) if general == "stream" else (generals, {"target": targets}, 4)
    )
    plugin = GradientSurgery(method="pcgrad", scope=scope, general=general, stream_batch_size=size)
    trained = train(plugin, data=own, streams=stream, **STEP)
    pairs = zip(plain["0"].model.parameters(), trained.model.parameters(), strict=True)
    found = [a.detach() - b.detach() for a, b in pairs]
    flat = [torch.cat([x.flatten() for x in v]) for v in (t, g)]
    for i, got in enumerate(found):
        weights = (
            pcgrad_weights(gram(*flat)) if scope == "global" else pcgrad_weights(gram(t[i].flatten(), g[i].flatten()))
        )
        torch.testing.assert_close(got, weights[0] * t[i] + weights[1] * g[i], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_preconditioned_surgery_uses_inner_products_of_what_adam_would_make(scope):
    """The Gram matrix of g / (sqrt(v / (1 - beta2^k)) + eps); the gradients that are combined are the raw ones."""
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.nn.Parameter(torch.randn(3, 2, generator=generator)),
        torch.nn.Parameter(torch.randn(5, generator=generator)),
    ]
    optimizer = torch.optim.AdamW(params, betas=(0.9, 0.9))
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator) * torch.logspace(-3, 1, p.numel()).view(p.shape)
        optimizer.step()
    t, g = ([torch.randn(p.shape, generator=generator) for p in params] for _ in range(2))
    factors = [1 / ((optimizer.state[p]["exp_avg_sq"] / (1 - 0.9**3)).sqrt() + 1e-8) for p in params]
    scaled = [[x * f for x, f in zip(v, factors, strict=True)] for v in (t, g)]
    plugin = GradientSurgery(method="pcgrad", scope=scope, precondition=True)
    plugin.wrap_optimizer(optimizer)
    view = GradientView(["a", "b"], params, [x.clone() for x in t])
    stream = StreamGradient(GradientView(["a", "b"], params, g), 0.0, 0.0, 1)
    plugin.gradients_ready(view, {"general": stream})
    for i in range(2):
        rows = [
            scaled[k][i].flatten() if scope == "layer" else torch.cat([x.flatten() for x in scaled[k]]) for k in (0, 1)
        ]
        a, b = pcgrad_weights(gram(*rows))
        torch.testing.assert_close(view.tensors[i], a * t[i] + b * g[i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [*CLOSED_FORMS, *TORCHJD])
@pytest.mark.parametrize("bad", [(0, 0), (0, 1), (1, 1)])
def test_a_gram_matrix_that_is_not_finite_gives_weights_of_nan(method, bad):
    if method in TORCHJD:
        pytest.importorskip("torchjd", reason="an optional extra")
    if method in ("upgrad", "dualproj"):
        pytest.importorskip("quadprog", reason="torchjd's projector needs it")
    grams = torch.stack([gram(*pair(seed, -1)) for seed in range(2)]).float()
    grams[0][bad] = grams[0][bad[::-1]] = torch.nan
    found = weighting(method)(grams)
    if method == "half-space":  # 1 t + b g, and the gradients themselves are NaN where <t, t> is
        assert found[0, 1].isnan() or bad == (0, 0)
    elif method == "pcgrad":
        assert found[0].isnan().any()
    else:
        assert found[0].isnan().all()
    assert torch.isfinite(found[1]).all()


def test_the_cosine_of_tiny_gradients_is_their_cosine():
    """The product of their squares is 0 in fp32."""
    t, g = pair(0, -1)
    tiny = GradientSurgery()
    names, params = ["a"], [torch.nn.Parameter(torch.zeros(6))]
    view = GradientView(names, params, [(t * 1e-12).float()])
    stream = StreamGradient(GradientView(names, params, [(g * 1e-12).float()]), 0.0, 0.0, 1)
    tiny.gradients_ready(view, {"general": stream})
    cosine = float(torch.cosine_similarity(t, g, 0))
    assert tiny.metrics("train") == {"cosine": pytest.approx(cosine, rel=1e-4), "conflicts": 1.0}


def test_unknown_methods_are_refused():
    with pytest.raises(ValueError, match="half-space"):
        GradientSurgery(method="nonsense")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stream_batch_size"):
        check_options(GradientSurgery(stream_batch_size=0))


def test_metrics_say_how_often_the_gradients_conflict():
    trainer = train(GradientSurgery(), data=TARGET, streams={"general": GENERAL}, max_steps=2)
    logs = [log for log in trainer.state.log_history if "gradient-surgery/cosine" in log]
    assert len(logs) == 2
    assert all(-1 <= log["gradient-surgery/cosine"] <= 1 for log in logs)
    assert {*CLOSED_FORMS} == {"half-space", "pcgrad"}
