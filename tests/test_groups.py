"""Rewards and advantages of groups: None counts nowhere, and groups may have any size."""

from __future__ import annotations

import math

import pytest
import torch

from trl_ext.groups import group_advantages, judged_total
from trl_ext.records import Rewards


def test_what_no_function_judged_has_no_total() -> None:
    values = torch.tensor([[1.0, 2.0], [math.nan, 2.0], [math.nan, math.nan]])
    total = judged_total(Rewards(values, ("a", "b"), torch.tensor([1.0, 0.5]), slice(0, 3)))
    assert total[:2].tolist() == [2.0, 1.0]
    assert total[2].isnan()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_groups_of_any_size(scale: str) -> None:
    rewards = torch.tensor([0.0, 1.0, 3.0, 1.0, float("nan"), 0.0, 2.0, 5.0])
    labels = torch.tensor([0, 0, 1, 1, 0, 0, 3, 3])
    got = group_advantages(rewards, labels, scale)
    for members in ([0, 1, 4, 5], [2, 3], [6, 7]):
        values = rewards[members]
        known = values[~values.isnan()]
        spread = {"group": known, "batch": rewards[~rewards.isnan()]}.get(scale)
        expected = values - known.mean()
        if spread is not None:
            expected = expected / (spread.std() + 1e-4)
        torch.testing.assert_close(got[members], expected.nan_to_num(0.0))
