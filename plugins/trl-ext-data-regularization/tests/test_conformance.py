"""Every plugin through the conformance kit."""

from __future__ import annotations

import pytest
from test_rollout_filter import noisy_reward
from trl_ext_data_regularization.data_regularization import DataRegularization
from trl_ext_data_regularization.gradient_surgery import GradientSurgery
from trl_ext_data_regularization.rollout_filter import RolloutFilter

from trl_ext.testing.conformance import conformance

test_data_regularization = pytest.mark.slow(conformance(DataRegularization(), trainer="sft"))
test_gradient_surgery = pytest.mark.slow(conformance(GradientSurgery(stream_batch_size=2), trainer="sft"))
test_gradient_surgery_grpo = pytest.mark.slow(conformance(GradientSurgery(stream_batch_size=2), trainer="grpo"))
test_gradient_surgery_dpo = pytest.mark.slow(conformance(GradientSurgery(stream_batch_size=2), trainer="dpo"))
test_gradient_surgery_rloo = pytest.mark.slow(conformance(GradientSurgery(stream_batch_size=2), trainer="rloo"))
test_rollout_filter = pytest.mark.slow(conformance(RolloutFilter(), trainer="grpo", reward=noisy_reward))
