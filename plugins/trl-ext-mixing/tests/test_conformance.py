"""Every plugin through the conformance kit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from mixing_runs import demonstrations, hash_of
from trl_ext_mixing.chord import Chord
from trl_ext_mixing.hpt import HPT
from trl_ext_mixing.parallel_averaging import ParallelAveraging
from trl_ext_mixing.relift import ReLIFT
from trl_ext_mixing.sft_surgery import Surgery

from trl_ext.testing.conformance import conformance


def some_solved(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Completions of even prompts solve them half of the time, those of odd ones never do; all groups differ."""
    sums = [sum(map(ord, completion)) for completion in completions]
    return [float(s % 2) if hash_of(p) % 2 == 0 else s % 7 / 10 for p, s in zip(prompts, sums, strict=True)]


UNSOLVED: dict[str, Any] = {"trainer": "grpo", "reward": some_solved, "dataset": demonstrations(16)}
"""Prompts with a demonstration each."""

test_chord = pytest.mark.slow(conformance(Chord(), trainer="grpo"))
test_chord_beside_dpo = pytest.mark.slow(conformance(Chord(), trainer="dpo"))
test_parallel_averaging_in_rloo = pytest.mark.slow(conformance(ParallelAveraging(), trainer="rloo"))
test_surgery = pytest.mark.slow(conformance(Surgery(), trainer="grpo"))
test_parallel_averaging = pytest.mark.slow(conformance(ParallelAveraging(), trainer="grpo"))
test_hpt = pytest.mark.slow(conformance(HPT(), **UNSOLVED))
test_relift = pytest.mark.slow(conformance(ReLIFT(buffer_size=2), **UNSOLVED))
