"""A coefficient that changes over the run."""

from __future__ import annotations

import math


def scheduled(start: float, end: float | None, progress: float, shape: str = "linear") -> float:
    """The value at a share of the run.

    Args:
        start: value at progress 0.
        end: value at progress 1; None keeps `start`.
        progress: share of the schedule already done; held at 1 beyond it.
        shape: "linear" or "cosine".
    """
    if end is None:
        return start
    share = min(progress, 1.0)
    if shape == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return start + (end - start) * share
