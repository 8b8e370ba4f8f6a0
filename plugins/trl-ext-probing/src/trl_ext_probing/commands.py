"""The probes and `compare` as commands and as Python functions; each imports what it needs when it runs."""

from __future__ import annotations

from trl_ext_probing.capability.capability_settings import CapabilitySettings
from trl_ext_probing.comparing.compare_settings import CompareSettings
from trl_ext_probing.drift.drift_settings import DriftSettings
from trl_ext_probing.excursions.excursions_settings import ExcursionSettings
from trl_ext_probing.from_scratch.control_settings import FromScratchSettings
from trl_ext_probing.passk.passk_settings import PasskSettings
from trl_ext_probing.reachability.reach_settings import ReachabilitySettings
from trl_ext_probing.settings import probe


@probe
def capability(settings: CapabilitySettings) -> None:
    """Measure how likely a base model finds a data set's responses, and recommend an objective."""
    from trl_ext_probing.capability.capability_run import run

    run(settings)


@probe
def compare(settings: CompareSettings) -> None:
    """Train arms on paired seeds, measure them, and tell which helps and what it costs; run it again to go on."""
    from trl_ext_probing.comparing.compare_run import run

    run(settings)


@probe
def drift(settings: DriftSettings) -> None:
    """Negative log-likelihood and next-token accuracy on general data, before and after, with paired intervals."""
    from trl_ext_probing.drift.drift_run import run

    run(settings)


@probe
def excursions(settings: ExcursionSettings) -> None:
    """Train by several recipes from each checkpoint, and compare pass@k and drift; run it again to go on."""
    from trl_ext_probing.excursions.excursions_run import run

    run(settings)


@probe
def from_scratch(settings: FromScratchSettings) -> None:
    """Fine-tune from pre-trained and from random weights, and tell what pre-training gave; resumes when killed."""
    from trl_ext_probing.from_scratch.control import run

    run(settings)


@probe
def passk(settings: PasskSettings) -> None:
    """pass@k on problems, unbiased, with confidence intervals; run it again to go on where it was interrupted."""
    from trl_ext_probing.passk.passk_run import run

    run(settings)


@probe
def reachability(settings: ReachabilitySettings) -> None:
    """Measure how often a base model solves each prompt, and which training it is ready for; resumes when killed."""
    from trl_ext_probing.reachability.reach_run import run

    run(settings)
