"""A plugin's own passes leave modes of modules and random states as they were, and its readers are waited for."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

from trl_ext import hookimpl
from trl_ext.engine.guard import Guard
from trl_ext.own_passes import inference_only, preserved_random_state, read_beside
from trl_ext.plugins.activation import activate


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_infers_and_comes_back_in_the_modes_that_it_had(fails: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5)))
    model[2].eval()  # such as a frozen part of a model in training
    before = [module.training for module in model.modules()]
    x = torch.ones(1, 4)
    try:
        with inference_only(model):
            inferred = model(x)
            assert not inferred.requires_grad
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    torch.testing.assert_close(inferred, model[0](x), rtol=0, atol=0)  # no dropout
    assert [module.training for module in model.modules()] == before
    assert model(x).requires_grad


def test_what_is_drawn_inside_does_not_show_outside() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with preserved_random_state(torch.device("cpu")):
        assert torch.equal(torch.rand(3), expected)
        torch.manual_seed(7)
    assert torch.equal(torch.rand(3), expected)


class Reader:
    """Notes when it is waited for."""

    def __init__(self, order: list[str]) -> None:
        self.order = order

    def weights_read(self) -> None:
        self.order.append("read")


class Writer:
    """Notes when its hook runs."""

    requires_api = "1"

    def __init__(self, order: list[str]) -> None:
        self.order = order

    @hookimpl
    def weights_updated(self, weights: Any, step: int, skipped: bool) -> None:
        self.order.append("written")


def test_who_reads_beside_the_training_is_waited_for_before_each_hook_and_forgotten_with_its_end() -> None:
    order: list[str] = []
    plugins = activate([], trainer="sft", instances=[Writer(order)])
    guard = Guard(plugins, torch.device("cpu"), 1, lambda: 0)
    reader = Reader(order)
    read_beside(reader)
    for _ in range(2):
        guard.run_all("weights_updated", weights=None, step=1, skipped=False)
    assert order == ["read", "written"] * 2
    del reader
    gc.collect()
    guard.run_all("weights_updated", weights=None, step=1, skipped=False)
    assert order[4:] == ["written"]
