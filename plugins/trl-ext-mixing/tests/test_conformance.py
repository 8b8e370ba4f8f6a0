"""Every plugin through the conformance kit."""

from __future__ import annotations

from typing import Any

import pytest
from mixing_runs import demonstrations, mixed_reward
from trl_ext_mixing.chord import Chord
from trl_ext_mixing.hpt import HPT
from trl_ext_mixing.parallel_averaging import ParallelAveraging
from trl_ext_mixing.relift import ReLIFT
from trl_ext_mixing.sft_surgery import Surgery

from trl_ext.testing.conformance import conformance

# Prompts with a demonstration each, of which some are solved and some are not.
UNSOLVED: dict[str, Any] = {"trainer": "grpo", "reward": mixed_reward, "dataset": demonstrations(16)}

test_chord = pytest.mark.slow(conformance(Chord(), trainer="grpo"))
test_surgery = pytest.mark.slow(conformance(Surgery(), trainer="grpo"))
test_parallel_averaging = pytest.mark.slow(conformance(ParallelAveraging(), trainer="grpo"))
test_hpt = pytest.mark.slow(conformance(HPT(), **UNSOLVED))
test_relift = pytest.mark.slow(conformance(ReLIFT(buffer_size=2), **UNSOLVED))
