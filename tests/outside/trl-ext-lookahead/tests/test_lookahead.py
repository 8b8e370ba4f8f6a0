"""An optimiser wrapper with a diagnostic, as an outside author would test it."""

import pytest
import torch
from trl_ext_lookahead import Lookahead, LookaheadOptimizer

from trl_ext.testing.conformance import conformance

test_lookahead = pytest.mark.slow(conformance(Lookahead(k=2), trainer="sft"))


def test_every_second_step_goes_half_of_the_way_back():
    """By hand: gradients of 1 at a rate of 1, from 0."""
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = LookaheadOptimizer(torch.optim.SGD([weight], lr=1.0), k=2, alpha=0.5)
    seen = []
    for _ in range(4):
        weight.grad = -torch.ones(())
        optimizer.step()
        seen.append(float(weight))
    assert seen == [1.0, 1.0, 2.0, 2.0]
