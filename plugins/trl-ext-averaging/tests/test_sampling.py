"""GRPO: training completions drawn from the average, when asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_reference import ema_of, grpo
from tiny_runs import Recorder, trainer
from trl_ext_averaging import Ema, Swa

from trl_ext.errors import ConfigurationError
from trl_ext.testing import tiny_llama


def weights_at_generation(run: Any) -> list[dict[str, torch.Tensor]]:
    """Train, and give the model's weights (fp64) at each generation."""
    seen = []
    generate = run.model.generate

    def noting(*args: Any, **kwargs: Any) -> Any:
        seen.append({name: p.detach().double().clone() for name, p in run.model.named_parameters()})
        return generate(*args, **kwargs)

    run.model.generate = noting
    run.train()
    return seen


@pytest.mark.parametrize("plugin", ["ema:decay=0.6,sampling=ema", "ema:decay=0.6,sampling=ema,deploy=raw,device=cpu"])
def test_completions_are_drawn_from_the_average_of_the_moment(tmp_path, plugin):
    recorder = Recorder()
    run = grpo(tmp_path, plugin, tiny_llama(hidden=16), recorder, beta=0.0)
    seen = weights_at_generation(run)
    assert len(seen) == 4
    for step, weights in enumerate(seen):
        for name in recorder.trajectory[0]:
            average = ema_of(recorder.path(name)[: step + 1], 0.6)
            torch.testing.assert_close(weights[name], average, rtol=1e-5, atol=1e-6)  # fp32 against fp64
    assert any(not torch.allclose(seen[-1][name], raw, atol=1e-3) for name, raw in recorder.trajectory[3].items())
    # The optimiser goes on from the raw weights.
    for name, raw in recorder.trajectory[-1].items():
        assert torch.equal(run.model.get_parameter(name).double(), raw)


def test_without_the_option_completions_are_drawn_from_the_policy(tmp_path):
    recorder = Recorder()
    run = grpo(tmp_path, "ema:decay=0.6", tiny_llama(hidden=16), recorder, beta=0.0)
    for weights, raw in zip(weights_at_generation(run), recorder.trajectory, strict=False):
        assert all(torch.equal(weights[name], raw[name]) for name in raw)


def test_the_policy_is_used_until_there_is_an_average(tmp_path):
    recorder = Recorder()
    run = grpo(tmp_path, "swa:start=1,sampling=swa", tiny_llama(hidden=16), recorder, beta=0.0)
    seen = weights_at_generation(run)
    for step in (0, 1):
        assert all(torch.equal(seen[step][name], raw) for name, raw in recorder.trajectory[step].items())
    for name in recorder.trajectory[0]:
        mean = recorder.path(name)[2:4].mean(0)
        torch.testing.assert_close(seen[3][name], mean, rtol=1e-5, atol=1e-6)  # fp32 against fp64


def test_an_average_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"ema: sampling='swa' is not one of ema_0\.9, ema_0\.99"):
        Ema(decay=[0.9, 0.99], sampling="swa")
    with pytest.raises(ValueError, match="swa: sampling='raw' is not one of swa"):
        Swa(sampling="raw")


@pytest.mark.parametrize("plugin", ["ema:sampling=ema", "swa:sampling=swa"])
def test_sft_draws_no_completions(tmp_path, plugin):
    with pytest.raises(ConfigurationError, match=r"is for trainers that draw completions .*, and this is sft"):
        trainer(tmp_path, [plugin])
