"""The files that trl_ext adds to a checkpoint, and how a complete checkpoint is told from an incomplete one."""

from trl_ext.checkpoints.completeness import newest_complete
from trl_ext.checkpoints.plugin_state import State

__all__ = ["State", "newest_complete"]
