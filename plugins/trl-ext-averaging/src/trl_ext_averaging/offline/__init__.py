"""Averages of checkpoints on disk: safetensors in, safetensors out, piece by piece, without a GPU."""

from trl_ext_averaging.offline.checkpoint import Checkpoint, checkpoints_of, open_checkpoint
from trl_ext_averaging.offline.plan import Plan, average

__all__ = ["Checkpoint", "Plan", "average", "checkpoints_of", "open_checkpoint"]
