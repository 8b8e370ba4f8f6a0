"""Every plugin through the conformance kit."""

from __future__ import annotations

from typing import Any

import pytest
from policy_runs import binary_reward, checksum_reward
from trl_ext_policy.clip_cov import ClipCov
from trl_ext_policy.entropy_advantage import EntropyAdvantage
from trl_ext_policy.entropy_reward import EntropyReward
from trl_ext_policy.gfpo import GFPO
from trl_ext_policy.gtpo import GTPO
from trl_ext_policy.kl_cov import KLCov
from trl_ext_policy.pass_at_k import PassAtK
from trl_ext_policy.pkpo import PKPO

from trl_ext.testing.conformance import conformance

GRPO: dict[str, Any] = {"trainer": "grpo", "reward": checksum_reward}
TWICE: dict[str, Any] = {"config": {"num_iterations": 2}}
"""The second use of a rollout has ratios other than 1."""

test_gfpo = pytest.mark.slow(conformance(GFPO(k=3, metric="efficiency"), **GRPO))
test_pkpo = pytest.mark.slow(conformance(PKPO(k=3), **GRPO))
test_pass_at_k = pytest.mark.slow(conformance(PassAtK(k=2), trainer="grpo", reward=binary_reward))
test_entropy_advantage = pytest.mark.slow(conformance(EntropyAdvantage(), **GRPO, **TWICE))
test_gtpo = pytest.mark.slow(conformance(GTPO(), **GRPO))
test_entropy_reward = pytest.mark.slow(conformance(EntropyReward(), trainer="grpo", reward=binary_reward))
# All tokens of the band, so that no random number decides: two ranks draw other ones than one.
test_clip_cov = pytest.mark.slow(conformance(ClipCov(share=1.0, low=0.0, high=0.2), **GRPO, **TWICE))
test_kl_cov = pytest.mark.slow(conformance(KLCov(share=0.3), **GRPO, **TWICE))
