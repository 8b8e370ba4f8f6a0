"""Every average on disk is sum_i c_i theta_i; here are the coefficients c_i of each method.

| method | coefficients | source |
|---|---|---|
| mean | c_i = 1 / n | soups: arXiv:2203.05482; SWA: arXiv:1803.05407; LAWA: arXiv:2306.03241 |
| EMA | c_0 = d_1 d_2 ... d_n, c_i = (1 - d_i) d_{i+1} ... d_n | `trl_ext_averaging.ema`, unrolled |
| WiSE-FT | 1 - a, a | arXiv:2109.01903, section 3 |
| SLERP | sin((1 - a) w) / sin w, sin(a w) / sin w; w is the angle of the two tensors | arXiv:2406.16768, section 3.2 |

They are the same for all tensors of a model but for SLERP, where the angle depends on the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from trl_ext_averaging.ema import decay_at
from trl_ext_averaging.offline.tensorfile import TensorEntry

Rule = Callable[[Sequence[TensorEntry]], Sequence[float]]
"""The entries of one tensor in all inputs -> one coefficient per input."""

PIECE = 1 << 20


def mean(n: int) -> list[float]:
    """1 / n each."""
    return [1 / n] * n


def ema(n: int, decay: float, warmup: bool = False) -> list[float]:
    """Those of an EMA that starts at the first input and is updated with each of the others, in order."""
    coefficients = [1.0]
    for update in range(1, n):
        d = decay_at(update, decay, warmup)
        coefficients = [d * c for c in coefficients] + [1 - d]
    return coefficients


def wise_ft(alpha: float) -> list[float]:
    """(1 - alpha) of the start, alpha of the tuned weights (arXiv:2109.01903)."""
    return [1 - alpha, alpha]


def slerp(alpha: float, with_base: bool) -> Rule:
    """Spherical interpolation of two tensors, by the angle between them (arXiv:2406.16768, section 3.2).

    With a base, which is then the first of three inputs, of the task vectors theta - base, which are added to the base.
    Where the angle is almost 0 or pi, or a vector is 0, the line.
    """

    def coefficients(entries: Sequence[TensorEntry]) -> list[float]:
        one, other = _on_sphere(_angle(entries, with_base), alpha)
        return [1 - one - other, one, other] if with_base else [one, other]

    return coefficients


def _on_sphere(angle: float, alpha: float) -> tuple[float, float]:
    sine = math.sin(angle)
    if not sine > 1e-6:
        return 1 - alpha, alpha
    return math.sin((1 - alpha) * angle) / sine, math.sin(alpha * angle) / sine


def _angle(entries: Sequence[TensorEntry], with_base: bool) -> float:
    """Angle between the last two inputs, or NaN where one of them is 0; read piece by piece, summed in fp64."""
    dot = one = other = 0.0
    for start in range(0, entries[0].numel, PIECE):
        pieces = [entry.read(start, min(start + PIECE, entry.numel)).double() for entry in entries]
        a, b = (piece - pieces[0] for piece in pieces[1:]) if with_base else pieces
        dot += float(torch.dot(a, b))
        one += float(torch.dot(a, a))
        other += float(torch.dot(b, b))
    return math.acos(max(-1.0, min(1.0, dot / math.sqrt(one * other)))) if one and other else math.nan
