"""A plugin's own passes leave modes of modules and random states as they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trl_ext.own_passes import inference_only, preserved_random_state


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
