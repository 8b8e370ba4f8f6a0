"""Advantages (B, T) with the policy's entropy, as an outside author would test them."""

from types import SimpleNamespace

import pytest
import torch
from trl_ext_entropy_advantages import EntropyAdvantages

from trl_ext.testing.conformance import conformance

test_entropy_advantages = pytest.mark.slow(conformance(EntropyAdvantages(), trainer="grpo"))


def test_the_bonus_is_bounded_by_the_advantage():
    """By hand: alpha 0.4 and kappa 2, so that the bonus of the first row ends at 0.5 and that of the second at 0.1."""
    rollouts = SimpleNamespace(entropy=torch.tensor([[1.0, 2.0], [1.0, 0.1], [3.0, 3.0]]))
    shaped = EntropyAdvantages(0.4, 2.0).advantages(rollouts, torch.tensor([1.0, -0.2, 0.0]))
    torch.testing.assert_close(shaped, torch.tensor([[1.4, 1.5], [-0.1, -0.16], [0.0, 0.0]]))
