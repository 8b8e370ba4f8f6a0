"""The conformance kit: properties that every plugin should have, checked by tiny runs on the CPU.

In a test file, one line makes a test of many cases, each a few seconds long:

    from trl_ext.testing.conformance import conformance

    test_my_plugin = conformance(MyPlugin(alpha=0.5), trainer="sft")

`trl-ext plugins check --run NAME` does the same with an installed plugin.
"""

from trl_ext.testing.conformance.case import Case, Outcome, Skipped, outcome_of
from trl_ext.testing.conformance.kit import CASES, cases_of, conformance
from trl_ext.testing.conformance.subject import Subject

__all__ = ["CASES", "Case", "Outcome", "Skipped", "Subject", "cases_of", "conformance", "outcome_of"]
