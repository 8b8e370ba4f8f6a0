"""Averages of checkpoints on disk: safetensors in, safetensors out, piece by piece, without a GPU."""

from trl_ext_averaging.offline.average import Plan, average
from trl_ext_averaging.offline.checkpoint import Checkpoint, checkpoints_of, open_checkpoint

__all__ = ["Checkpoint", "Plan", "average", "checkpoints_of", "open_checkpoint"]
