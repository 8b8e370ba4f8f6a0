"""The files that trl_ext adds to a checkpoint, and how a complete checkpoint is told from an incomplete one."""
