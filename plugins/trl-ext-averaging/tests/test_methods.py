"""BEMA, SWA, LAWA and WiSE-FT against their closed forms, and what all methods share."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from trajectories import Recorded, context_of, deployed, play, trajectory, view_of
from trl_ext_averaging import Bema, Ema, Lawa, Swa, WiseFt, shadows

from trl_ext.errors import CheckpointError, ConfigurationError
from trl_ext.options import check_options
from trl_ext.plugins.activation import activate

EXACT = {"rtol": 0, "atol": 1e-12}  # fp64, a few dozen operations on numbers of size 10
METHODS = [
    (Ema, {"decay": 0.7}),
    (Ema, {"decay": [0.7, 0.9], "warmup": True, "compare": True}),
    (Bema, {"every": 2}),
    (Swa, {}),
    (Lawa, {"k": 3, "every": 2}),
    (WiseFt, {"alpha": 0.3}),
    (WiseFt, {"alpha": [0.3, 0.6], "compare": True}),
]
ALL = pytest.mark.parametrize(("method", "options"), METHODS, ids=lambda value: getattr(value, "__name__", None))


def start(plugin, path, dtype=torch.float64, model=None):
    model = model or Recorded(dtype)
    model.fill(path[0])
    plugin.setup(context_of(model))
    return model


def run(plugin, path, **kwargs):
    model = start(plugin, path, **kwargs)
    play(plugin, model, path, range(1, len(path)))
    return model


def everything(plugin, model) -> torch.Tensor:
    """The weights under every context of the plugin."""
    contexts = plugin.deployed_weights(view_of(model))
    names = list(contexts) if isinstance(contexts, dict) else [None]
    return torch.stack([deployed(plugin, model, name) for name in names])


def result(plugin, path, **kwargs) -> torch.Tensor:
    """The weights under every context of the plugin at the end of a trajectory."""
    return everything(plugin, run(plugin, path, **kwargs))


# Closed forms.


def bema_by_hand(path: torch.Tensor, anchor: int, steps: list[int], kappa=0.5, eta=0.2, rho=10.0, gamma=1.0):
    ema = path[anchor]
    for t in steps:
        beta = (rho + gamma * t) ** -kappa
        ema = (1 - beta) * ema + beta * path[t]
    now = len(path) - 1
    return ema + (rho + gamma * now) ** -eta * (path[now] - path[anchor])


def test_bema_is_the_papers_recursion_with_the_vetted_setting():
    path = trajectory(12)
    model = run(plugin := Bema(start=2, every=5), path)
    torch.testing.assert_close(deployed(plugin, model), bema_by_hand(path, 2, [7, 12]), **EXACT)


def test_bema_corrects_with_the_weights_of_the_moment():
    path = trajectory(14)
    model = run(plugin := Bema(start=2, every=5, kappa=0.3, eta=0.4, rho=3, gamma=0.5), path)
    expected = bema_by_hand(path, 2, [7, 12], kappa=0.3, eta=0.4, rho=3, gamma=0.5)
    torch.testing.assert_close(deployed(plugin, model), expected, **EXACT)


def test_bema_rate_has_a_floor():
    path = trajectory(2)
    model = run(plugin := Bema(every=1, min_beta=0.9, eta=50.0), path)  # eta: correction of 1e-50
    expected = 0.1 * (0.1 * path[0] + 0.9 * path[1]) + 0.9 * path[2]
    torch.testing.assert_close(deployed(plugin, model), expected, **EXACT)


def test_swa_is_the_mean_of_the_tail():
    path = trajectory(11)
    model = run(plugin := Swa(start=3, every=4), path)
    torch.testing.assert_close(deployed(plugin, model), (path[7] + path[11]) / 2, **EXACT)


def test_swa_deploys_raw_weights_until_it_has_seen_some():
    path = trajectory(6)
    model = run(plugin := Swa(start=3, every=4), path)
    assert torch.equal(deployed(plugin, model), path[6])


@pytest.mark.parametrize(("last", "members"), [(1, []), (2, [2]), (5, [2, 4]), (11, [6, 8, 10])])
def test_lawa_is_the_mean_of_the_latest_snapshots(last, members):
    path = trajectory(last)
    model = run(plugin := Lawa(k=3, every=2), path)
    expected = path[members].mean(0) if members else path[last]
    torch.testing.assert_close(deployed(plugin, model), expected, **EXACT)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_wise_ft_lies_between_the_start_and_now(alpha):
    path = trajectory(6)
    model = run(plugin := WiseFt(alpha=alpha, start=2), path)
    torch.testing.assert_close(deployed(plugin, model), (1 - alpha) * path[2] + alpha * path[6], **EXACT)


# What they share.


@ALL
@pytest.mark.parametrize("cut", [0, 1, 4, 7])
def test_resume_is_bit_identical(method, options, cut):
    path = trajectory(7)
    options = {"start": 1, **options}
    expected = result(method(**options), path)
    model = start(first := method(**options), path)
    play(first, model, path, range(1, cut + 1))
    saved = {key: value.clone() if torch.is_tensor(value) else value for key, value in first.state_dict().items()}
    second = method(**options)
    model.fill(path[cut])
    second.setup(context_of(model, resuming=True))
    second.load_state_dict(saved)
    play(second, model, path, range(cut + 1, 8))
    assert torch.equal(everything(second, model), expected)


@ALL
def test_copies_in_host_memory_change_nothing(method, options):
    path = trajectory(5)
    beside, host = (method(**{**options, "device": device}) for device in ("model", "cpu"))
    assert torch.equal(result(beside, path), result(host, path))


@pytest.mark.parametrize("devices", [("mps", "mps"), ("cuda:0", "cuda:1"), ("cuda:0", "cpu")])
def test_copies_in_host_memory_meet_the_weights_there(devices):
    """On other GPUs than CUDA's, and in a model that `device_map` spreads over several; the tensors have no values."""
    found = []

    class Noting(Ema):
        def update(self, copies, theta, updates, step):
            found.extend(tensor.device for tensor in (*copies["ema"], *theta))

    with FakeTensorMode():
        model = nn.ParameterList(torch.empty(2, 2, device=device) for device in devices)
        plugin = Noting(device="cpu")
        plugin.setup(context_of(model))
        plugin.weights_updated(view_of(model), 1, False)
    assert found == [torch.device("cpu")] * 4


@ALL
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_working_in_chunks_changes_nothing(method, options, dtype, monkeypatch):
    path = trajectory(5, dtype=dtype)
    whole = result(method(**options), path, dtype=dtype)
    sizes = []

    def small_chunks(*columns, limit, cut=shadows.chunks):
        for group in cut(*columns, limit=4):  # cuts the matrix of 6 and separates it from the vector of 4
            sizes.append(sum(tensor.numel() for tensor in group[0]))
            yield group

    monkeypatch.setattr(shadows, "chunks", small_chunks)
    assert torch.equal(result(method(**options), path, dtype=dtype), whole)
    assert max(sizes) <= 4


@ALL
def test_a_second_training_starts_afresh(method, options):
    first, second = trajectory(5, seed=1), trajectory(5, seed=2)
    expected = result(method(**options), second)
    model = run(plugin := method(**options), first)
    assert torch.equal(result(plugin, second, model=model), expected)


@ALL
def test_only_the_chosen_parameters_are_averaged_and_nothing_else_moves(method, options):
    path = trajectory(5)
    model = run(plugin := method(**options, parameters="^vector$"), path)
    model.counter.fill_(3.0)
    contexts = plugin.deployed_weights(view_of(model))
    name = plugin.averages()[0]
    with contexts[name] if isinstance(contexts, dict) else contexts:
        assert torch.equal(model.flat()[:6], path[5][:6])
        assert not torch.equal(model.flat()[6:], path[5][6:])
        assert torch.equal(model.frozen, torch.full((2,), 7.0, dtype=torch.float64))
        assert model.counter == 3
    assert {key.split("/")[1] for key in plugin.state_dict() if "/" in key} == {"vector"}


@ALL
def test_evaluating_before_training_uses_the_raw_weights(method, options):
    model = Recorded()
    model.fill(trajectory(0)[0])
    assert torch.equal(everything(method(**options), model)[0], trajectory(0)[0])


@ALL
def test_low_precision_weights_are_averaged_in_fp32(method, options):
    path = trajectory(5, dtype=torch.bfloat16)
    plugin = method(**options)
    narrow = result(plugin, path, dtype=torch.bfloat16)
    wide = result(method(**options), path.double())
    # Rounded once, at the end: half a unit of bf16's eight bits, a little more for the fp32 arithmetic before it.
    torch.testing.assert_close(narrow.double(), wide, rtol=2**-8, atol=1e-5)
    stored = {key: value.dtype for key, value in plugin.state_dict().items() if "/" in key}
    exact = {name for name, kind in plugin.copy_kinds().items() if kind == "exact"}
    assert all((dtype == torch.bfloat16) == (key.split("/")[0] in exact) for key, dtype in stored.items())


def test_a_run_has_one_average_and_the_advice_for_more_works():
    with pytest.raises(
        ConfigurationError, match=r"Keep one; or, of a plugin that can run beside another .* label each"
    ):
        activate("ema,ema", trainer="sft")
    for both in ("ema:label=first,ema:label=second", "ema,swa"):
        with pytest.raises(ConfigurationError, match=r"does not run beside .*list the values in one plugin") as caught:
            activate(both, trainer="sft")
    advised = re.findall(r"[a-z-]+:[a-z]+=\[[\d.,]+\]", str(caught.value))
    assert len(advised) == 2
    assert activate(advised[0], trainer="sft").plugins[0].instance.averages() == ("ema_0.99", "ema_0.999")
    assert activate(advised[1], trainer="grpo").plugins[0].instance.averages() == ("wise_ft_0.3", "wise_ft_0.6")


def test_state_of_other_options_is_refused():
    path = trajectory(3)
    run(saved := Ema(decay=[0.9, 0.5]), path)
    start(other := Ema(decay=[0.9, 0.6]), path)
    with pytest.raises(CheckpointError, match=r"ema: the saved copy 'ema_0.6' of matrix is missing"):
        other.load_state_dict(saved.state_dict())
    state = saved.state_dict()
    state["ema_0.9/vector"] = torch.zeros(5)
    start(same := Ema(decay=[0.9, 0.5]), path)
    with pytest.raises(CheckpointError, match=r"of vector has shape \(5,\), expected \(4,\)"):
        same.load_state_dict(state)


def test_a_pattern_that_matches_nothing_is_refused_at_the_start():
    with pytest.raises(ConfigurationError, match=r"parameters='lm_head' matches none of the 2 trainable"):
        start(Swa(parameters="lm_head"), trajectory(0))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (Bema, {"eta": -1.0}, "eta=-1.0 is not >= 0"),
        (Bema, {"rho": 0.5}, "rho=0.5 is not >= 1"),
        (Bema, {"min_beta": 2.0}, "min_beta=2.0 is not in [0, 1]"),
        (Lawa, {"k": 0}, "k=0 is not >= 1"),
        (Lawa, {"every": 0}, "every=0 is not >= 1"),
        (WiseFt, {"alpha": 1.5}, "alpha=1.5 is not in [0, 1]"),
        (WiseFt, {"alpha": [0.5, -0.1]}, "alpha=[0.5, -0.1] is not in [0, 1]"),
        (WiseFt, {"alpha": [0.5, 0.5]}, "one twice"),
        (WiseFt, {"every": 2}, "wise-ft: every=2 has no meaning"),
        (Ema, {"reference": "bema"}, "ema: reference='bema' is not one of ema"),
        (Ema, {"reference": "ema", "device": "cpu"}, "remove device=cpu"),
    ],
)
def test_bad_options_are_refused(method, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_options(method(**options))
