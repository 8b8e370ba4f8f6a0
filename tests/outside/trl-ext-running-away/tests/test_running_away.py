"""A plugin with a stream and a running mean in its state, as an outside author would test it."""

import pytest
from trl_ext_running_away import RunningAway

from trl_ext.testing.conformance import conformance

test_running_away = pytest.mark.slow(conformance(RunningAway(), trainer="sft"))
