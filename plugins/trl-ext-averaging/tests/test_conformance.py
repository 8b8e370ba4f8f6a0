"""Every weight average through the conformance kit, in the trainers that it is for."""

from __future__ import annotations

import pytest
from trl_ext_averaging import Bema, Ema, Lawa, Swa, WiseFt

from trl_ext.testing.conformance import conformance

test_ema = pytest.mark.slow(conformance(Ema(0.8), trainer="sft"))
test_ema_dpo = pytest.mark.slow(conformance(Ema(0.8), trainer="dpo"))
test_ema_kto = pytest.mark.slow(conformance(Ema(0.8), trainer="kto"))
test_ema_reward = pytest.mark.slow(conformance(Ema(0.8), trainer="reward"))
test_ema_distillation = pytest.mark.slow(conformance(Ema(0.8, sampling="ema"), trainer="distillation"))
test_ema_samples = pytest.mark.slow(conformance(Ema(0.8, sampling="ema"), trainer="grpo"))
test_bema = pytest.mark.slow(conformance(Bema(every=2), trainer="sft"))
test_swa = pytest.mark.slow(conformance(Swa(start=1), trainer="sft"))
test_lawa = pytest.mark.slow(conformance(Lawa(k=2, every=1), trainer="sft"))
test_wise_ft = pytest.mark.slow(conformance(WiseFt(0.3), trainer="sft"))
