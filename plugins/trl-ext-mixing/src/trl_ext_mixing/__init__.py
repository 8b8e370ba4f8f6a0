"""RL and SFT in one step: parallel averaging and its relatives, one file each, with pass@k and drift probes."""

from trl_ext_mixing.chord import Chord
from trl_ext_mixing.hpt import HPT
from trl_ext_mixing.parallel_averaging import ParallelAveraging
from trl_ext_mixing.relift import ReLIFT
from trl_ext_mixing.sft_surgery import Surgery

__all__ = ["HPT", "Chord", "ParallelAveraging", "ReLIFT", "Surgery"]
