"""RL and SFT in one step: parallel averaging and its relatives, one file each, with pass@k and drift probes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_ext_mixing.chord import Chord
    from trl_ext_mixing.hpt import HPT
    from trl_ext_mixing.parallel_averaging import ParallelAveraging
    from trl_ext_mixing.relift import ReLIFT
    from trl_ext_mixing.sft_surgery import Surgery

__all__ = ["HPT", "Chord", "ParallelAveraging", "ReLIFT", "Surgery"]

_HOMES = {
    "Chord": "trl_ext_mixing.chord",
    "HPT": "trl_ext_mixing.hpt",
    "ParallelAveraging": "trl_ext_mixing.parallel_averaging",
    "ReLIFT": "trl_ext_mixing.relift",
    "Surgery": "trl_ext_mixing.sft_surgery",
}


def __getattr__(name: str) -> Any:
    """Load what is asked for: commands of this distribution answer `--help` without torch."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
