"""Gradient surgery between RL and SFT against the projections written out."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from branches import largest_difference
from mixing_runs import (
    Late,
    Recorder,
    constant_reward,
    grpo,
)
from torch import Tensor
from trl_ext_mixing import Surgery

from trl_ext.options import check_options, option_type


def test_surgery_does_not_blow_up_rounding_where_no_group_tells_anything(tmp_path: Path) -> None:
    """Six times 0.3 has a mean that rounds, so TRL's advantages are not quite zero."""
    before, after = Recorder(), Late()
    six = {"per_device_train_batch_size": 6, "num_generations": 6}
    grpo(tmp_path, [Surgery(), after], recorder=before, reward=constant_reward, max_steps=2, **six).train()
    for mine, sft in zip(after.rl, before.sft, strict=True):
        assert largest_difference(mine, sft) == 0


@pytest.mark.parametrize("normalise", [True, False])
def test_the_surgery_leaves_no_conflict_in_a_run(tmp_path: Path, normalise: bool) -> None:
    before, after = Recorder(), Late()
    grpo(tmp_path, [Surgery(normalise=normalise), after], recorder=before, max_steps=8).train()
    conflicts = 0
    for g_rl, g_sft, mixed in zip(before.rl, before.sft, after.rl, strict=True):
        a, b, got = (torch.cat([t.flatten() for t in v]) for v in (g_rl, g_sft, mixed))
        if normalise:
            mean = (a.norm() + b.norm()) / 2
            a, b = a / a.norm() * mean, b / b.norm() * mean
        conflicts += int(a @ b < 0)
        d = torch.clamp(a @ b, max=0.0)
        expected = (a - d / (b @ b) * b) + (b - d / (a @ a) * a)
        # Weights are made of fp32 scalars.
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert conflicts > 0, "no step of this run had a conflict; choose another seed"


def least_norm(a: Tensor, b: Tensor) -> Tensor:
    """MGDA for two (Sener and Koltun, arXiv:1810.04650, eq. 4): the shortest convex combination, by a fine grid."""
    shares = torch.linspace(0, 1, 100_001, dtype=torch.float64)[:, None]
    a, b = a.double(), b.double()
    squared = shares**2 * (a @ a) + (1 - shares) ** 2 * (b @ b) + 2 * shares * (1 - shares) * (a @ b)
    share = shares[squared.argmin()]
    return share * a + (1 - share) * b


@pytest.mark.parametrize("weighting", ["half-space", "mgda"])
def test_the_weightings_of_the_projection_distribution_apply_to_the_two_gradients(
    tmp_path: Path, weighting: str
) -> None:
    pytest.importorskip("trl_ext_data_regularization", reason="its weightings are used")
    if weighting == "mgda":
        pytest.importorskip("torchjd", reason="MGDA is torchjd's")
    before, after = Recorder(), Late()
    plugin = Surgery(weighting=weighting, normalise=False)
    grpo(tmp_path, [plugin, after], recorder=before, max_steps=8).train()
    conflicts = 0
    for g_rl, g_sft, mixed in zip(before.rl, before.sft, after.rl, strict=True):
        a, b, got = (torch.cat([t.flatten() for t in v]).double() for v in (g_rl, g_sft, mixed))
        conflicts += int(a @ b < 0)
        expected = a - torch.clamp(a @ b, max=0.0) / (b @ b) * b if weighting == "half-space" else least_norm(a, b)
        # Weights are made of fp32 scalars; torchjd stops its iteration at 1e-3 of the norm.
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6 if weighting == "half-space" else 2e-3)
    assert conflicts > 0, "no step of this run had a conflict; choose another seed"


def test_the_weightings_are_those_that_the_projection_distribution_has() -> None:
    weightings = pytest.importorskip("trl_ext_data_regularization.weightings", reason="its weightings are named")
    names = get_args(option_type(Surgery, "weighting"))
    assert set(names) == {*weightings.CLOSED_FORMS, *weightings.TORCHJD}
    with pytest.raises(ValueError, match="weighting='majority' is not one of pcgrad, half-space, upgrad"):
        check_options(Surgery(weighting="majority"))  # type: ignore[arg-type]
