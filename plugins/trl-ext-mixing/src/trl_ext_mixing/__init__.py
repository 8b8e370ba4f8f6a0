"""RL and SFT in one step: parallel averaging and its relatives, one file each, with pass@k and drift probes."""

from trl_ext_mixing.parallel_averaging import ParallelAveraging

__all__ = ["ParallelAveraging"]
