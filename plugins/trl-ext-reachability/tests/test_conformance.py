"""Every plugin through the conformance kit."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from runs import checksum_reward, prompts
from test_reachability import write_probe
from trl_ext_reachability.adaptive_lr import AdaptiveLr
from trl_ext_reachability.best_of_m import BestOfM
from trl_ext_reachability.pg import PG
from trl_ext_reachability.process_reward import ProcessReward
from trl_ext_reachability.reachability import Reachability

from trl_ext.testing.conformance import conformance
from trl_ext.testing.runs import additions

FOLDER = TemporaryDirectory(prefix="probe-")
PROBE = write_probe(Path(FOLDER.name, "probe"), max_completion_length=4)

test_adaptive_lr = pytest.mark.slow(conformance(AdaptiveLr(), trainer="sft"))
test_adaptive_lr_grpo = pytest.mark.slow(conformance(AdaptiveLr(), trainer="grpo"))
test_adaptive_lr_reward = pytest.mark.slow(conformance(AdaptiveLr(), trainer="reward"))
test_best_of_m = pytest.mark.slow(conformance(BestOfM(success=0.8), trainer="grpo", reward=checksum_reward))
test_pg = pytest.mark.slow(conformance(PG(), trainer="grpo", reward=checksum_reward))
test_process_reward = pytest.mark.slow(
    conformance(ProcessReward("runs:constant_verifier", split="token"), trainer="grpo", reward=checksum_reward)
)
test_reachability = pytest.mark.slow(
    conformance(
        Reachability(PROBE, reroute_every=1),
        trainer="grpo",
        reward=checksum_reward,
        dataset=prompts(),
        streams={"demonstrations": additions(16)},
    )
)
