"""Objectives that read what `trl-ext probe capability` found of the base model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from trl_ext_objectives.auto import Auto
from trl_ext_objectives.threshold import Threshold
from trl_ext_probing.capability.positions import Capability
from trl_ext_probing.intervals import Estimate

from trl_ext.errors import ConfigurationError
from trl_ext.records import TokenRecord


@pytest.fixture
def probed(tmp_path: Path) -> Path:
    """A measurement in which p is uniform over [0, 1], with a mean of 0.9 all the same."""
    levels = [i / 1000 for i in range(1001)]
    mean = Estimate(0.9, 0.8, 1.0, 9)
    capability = Capability(mean, mean, 0.45, examples=9, tokens=90, quantiles=levels, example_quantiles=levels)
    content = {"schema": 1, "probe": "capability", "models": [{"model": "m", **asdict(capability)}]}
    (tmp_path / "results.json").write_text(json.dumps(content))
    return tmp_path


def test_threshold_by_quantile_of_the_base_model(probed: Path) -> None:
    """q = 0.75 keeps the quarter of tokens that the base model finds likeliest."""
    log_probs = torch.tensor([[0.7498, 0.7502]]).log()
    mask = torch.ones(1, 2, dtype=torch.bool)
    tokens = TokenRecord(log_probs, log_probs, mask, True, torch.tensor(2.0), 1, 0.0)
    objective = Threshold(0.75, quantile_of=str(probed))
    assert (objective.per_token_loss(tokens) != 0).tolist() == [[False, True]]
    with pytest.raises(ConfigurationError, match=r"threshold: quantile_of: .*trl-ext probe capability"):
        Threshold(0.75, quantile_of=str(probed / "absent")).per_token_loss(tokens)


def test_auto_takes_what_was_measured(probed: Path) -> None:
    auto = Auto(probe=str(probed))
    auto.check(None)  # type: ignore[arg-type]
    assert auto.metrics("train") == {"mean_p": 0.9, "prior_leaning": 1.0}


def test_auto_takes_the_probes_advice_and_keeps_it() -> None:
    def tokens(p: float, progress: float) -> TokenRecord:
        log_probs = torch.full((1, 4), p, dtype=torch.float64).log().requires_grad_()
        mask = torch.ones(1, 4, dtype=torch.bool)
        return TokenRecord(log_probs, log_probs, mask, True, torch.tensor(4.0), 1, progress)

    strong, weak = Auto(), Auto()
    assert strong.per_token_loss(tokens(0.9, 0.0)).tolist() == [pytest.approx([0.1] * 4)]
    assert weak.per_token_loss(tokens(0.5, 0.0)).tolist() == [pytest.approx([-np.log(0.5)] * 4)]
    assert weak.metrics("train") == {"mean_p": 0.5, "prior_leaning": 0.0}
    # Settled with the first window: what the model becomes later changes nothing.
    for _ in range(5):
        assert weak.per_token_loss(tokens(0.99, 0.5)).tolist() == [pytest.approx([-np.log(0.99)] * 4)]
    resumed = Auto()
    resumed.load_state_dict(strong.state_dict())
    assert resumed.per_token_loss(tokens(0.5, 0.9)).tolist() == [pytest.approx([0.5] * 4)]
