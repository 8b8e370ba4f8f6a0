"""EMA against its closed form, and that low-precision weights move."""

from __future__ import annotations

import pytest
import torch
from trajectories import Recorded, context_of, deployed, play, trajectory, view_of
from trl_ext_averaging import Ema

from trl_ext.options import check_options

EXACT = {"rtol": 0, "atol": 1e-12}  # fp64, a few dozen operations on numbers of size 10


def run(plugin: Ema, path: torch.Tensor, skipped: tuple[int, ...] = ()) -> Recorded:
    model = Recorded()
    model.fill(path[0])
    plugin.setup(context_of(model))
    play(plugin, model, path, range(1, len(path)), skipped)
    return model


def test_ema_is_the_geometric_sum_over_the_trajectory():
    path, d = trajectory(12), 0.8
    model = run(plugin := Ema(decay=d), path)
    weights = torch.tensor([d**12, *((1 - d) * d ** (12 - t) for t in range(1, 13))], dtype=torch.float64)
    torch.testing.assert_close(deployed(plugin, model), weights @ path, **EXACT)


def test_start_and_interval_choose_the_steps_that_count():
    path, d = trajectory(11), 0.6
    model = run(plugin := Ema(decay=d, start=2, every=3), path)  # anchored at 2, updated at 5, 8 and 11
    expected = d**3 * path[2] + (1 - d) * (d**2 * path[5] + d * path[8] + path[11])
    torch.testing.assert_close(deployed(plugin, model), expected, **EXACT)


def test_raw_weights_are_deployed_before_the_start():
    path = trajectory(3)
    model = run(plugin := Ema(decay=0.6, start=4), path)
    assert torch.equal(deployed(plugin, model), path[3])


def test_warm_up_follows_the_published_schedule():
    path, d = trajectory(6), 0.35
    model = run(plugin := Ema(decay=d, warmup=True), path)
    average = path[0]
    for t in range(6):
        d_t = min(d, (1 + t) / (10 + t))  # binds from t = 4 on: 5/14 > 0.35
        average = d_t * average + (1 - d_t) * path[t + 1]
    torch.testing.assert_close(deployed(plugin, model), average, **EXACT)


def test_skipped_steps_are_not_averaged():
    path, d = trajectory(3), 0.5
    model = run(plugin := Ema(decay=d), path, skipped=(2,))
    torch.testing.assert_close(deployed(plugin, model), 0.25 * path[0] + 0.25 * path[1] + 0.5 * path[3], **EXACT)


def test_bf16_weights_move_at_decay_0999():
    model = Recorded(dtype=torch.bfloat16)
    model.fill(torch.ones(10))
    plugin = Ema(decay=0.999)
    plugin.setup(context_of(model))
    model.fill(torch.full((10,), 1.05))
    target = model.vector[0].item()
    for step in range(1, 3001):
        plugin.weights_updated(view_of(model), step, False)
    shadow = plugin.state_dict()["ema/vector"]
    expected = target - (target - 1) * 0.999**3000
    torch.testing.assert_close(shadow, torch.full((4,), expected), rtol=0, atol=1e-4)  # 3,000 fp32 roundings
    assert model.vector.dtype == torch.bfloat16


def test_several_decays_side_by_side_equal_single_runs():
    path = trajectory(9)
    model = run(both := Ema(decay=[0.9, 0.5], compare=True, deploy="ema_0.5"), path)
    assert list(both.deployed_weights(view_of(model))) == ["ema_0.5", "raw", "ema_0.9"]
    for d in (0.9, 0.5):
        alone = Ema(decay=d)
        assert torch.equal(deployed(both, model, f"ema_{d}"), deployed(alone, run(alone, path)))
    assert torch.equal(deployed(both, model, "raw"), path[9])


@pytest.mark.parametrize("options", [{}, {"decay": [0.9, 0.5], "compare": True}, {"deploy": "raw", "compare": True}])
def test_raw_weights_come_back_bit_for_bit_also_after_an_exception(options):
    path = trajectory(4)
    model = run(plugin := Ema(**{"decay": 0.7, **options}), path)
    contexts = plugin.deployed_weights(view_of(model))
    for context in contexts.values() if isinstance(contexts, dict) else [contexts]:
        with pytest.raises(ZeroDivisionError), context:
            model.forward_count = 1 / 0
        assert torch.equal(model.flat(), path[4])


@pytest.mark.parametrize("cut", range(8))
def test_resume_at_any_step_is_bit_identical(cut):
    path = trajectory(7)
    options = {"decay": 0.7, "start": 2, "every": 2, "warmup": True}
    reference = run(whole := Ema(**options), path)
    model = Recorded()
    model.fill(path[0])
    first = Ema(**options)
    first.setup(context_of(model))
    play(first, model, path, range(1, cut + 1))
    saved = {key: value.clone() if torch.is_tensor(value) else value for key, value in first.state_dict().items()}
    second = Ema(**options)
    model.fill(path[cut])
    second.setup(context_of(model, resuming=True))
    second.load_state_dict(saved)
    play(second, model, path, range(cut + 1, 8))
    assert torch.equal(deployed(second, model), deployed(whole, reference))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, "decay=1.0"),
        ({"decay": [0.9, 1.0]}, r"decay=\[0.9, 1.0\]"),
        ({"decay": [0.9, 0.9]}, "one twice"),
        ({"decay": [0.9999999, 0.99999999]}, "one twice"),  # both are `ema_1`
        ({"decay": []}, "no decay"),
        ({"every": 0}, "every=0"),
        ({"start": -1}, "start=-1"),
        ({"device": "disk"}, "device='disk'"),
        ({"deploy": "ema_0.9"}, "raw, ema"),
        ({"parameters": "("}, "regular expression"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_options(Ema(**options))
