"""Data-regularised post-training (arXiv:2605.07063) as plugins of trl_ext."""
