"""Processes that end with the one that started them, however that ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

TIED = "TRL_EXT_TIED"
"""Set in the environment of a job and of a launch: the processes that train beneath are to be tied to their parents."""
_PR_SET_PDEATHSIG = 1
"""Of Linux's `prctl`: the signal that a process gets when its parent has ended."""


def tie() -> None:
    """Have this process killed when its parent ends; where the system is not Linux, it goes on.

    Killing a group of processes does not do: launchers give each rank a session, and so a group, of its own.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def tie_where_asked() -> None:
    """`tie`, where whoever started this process wants it."""
    if TIED in os.environ:
        tie()
