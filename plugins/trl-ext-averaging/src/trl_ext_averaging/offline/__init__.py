"""Averages of checkpoints on disk: safetensors in, safetensors out, piece by piece, without a GPU."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_ext_averaging.offline.checkpoint import Checkpoint, checkpoints_of, open_checkpoint
    from trl_ext_averaging.offline.plan import Plan, average

__all__ = ["Checkpoint", "Plan", "average", "checkpoints_of", "open_checkpoint"]

_HOMES = {
    "Checkpoint": "trl_ext_averaging.offline.checkpoint",
    "Plan": "trl_ext_averaging.offline.plan",
    "average": "trl_ext_averaging.offline.plan",
    "checkpoints_of": "trl_ext_averaging.offline.checkpoint",
    "open_checkpoint": "trl_ext_averaging.offline.checkpoint",
}


def __getattr__(name: str) -> Any:
    """Load what is asked for: the command `average` answers `--help` without torch."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
