"""Combinations u = a t + b g of the target's gradient t and the mean general gradient g, from their Gram matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Weighting = Callable[[Tensor], Tensor]
"""(..., 2, 2) Gram matrix of (t, g) to (..., 2) weights (a, b)."""

CLOSED_FORMS = ("half-space", "pcgrad")
# The weightings of torchjd that are functions of the Gram matrix, need no labels, and keep no state between steps.
TORCHJD = {
    "upgrad": "UPGradWeighting",
    "mgda": "MGDAWeighting",
    "dualproj": "DualProjWeighting",
    "imtl-g": "IMTLGWeighting",
    "aligned-mtl": "AlignedMTLWeighting",
    "mean": "MeanWeighting",
    "sum": "SumWeighting",
}


def half_space(gram: Tensor) -> Tensor:
    """The projection of t onto {u : <u, g> >= 0}: u = t - min(0, <t, g> / |g|^2) g (arXiv:1812.00420, eq. 11)."""
    b = -(gram[..., 0, 1] / _positive(gram[..., 1, 1])).clamp(max=0)
    return torch.stack([torch.ones_like(b), b], -1)


def pcgrad(gram: Tensor) -> Tensor:
    """The sum of t and g, each projected onto the other's half-space (arXiv:2001.06782, Algorithm 1, two tasks)."""
    conflict = gram[..., 0, 1].clamp(max=0)
    return 1 - torch.stack([conflict / _positive(gram[..., 0, 0]), conflict / _positive(gram[..., 1, 1])], -1)


def weighting(name: str) -> Weighting:
    """A weighting by name.

    Raises:
        ImportError: it comes from torchjd, and torchjd or what it needs is not installed.
    """
    if name in CLOSED_FORMS:
        return {"half-space": half_space, "pcgrad": pcgrad}[name]
    hint = 'pip install "trl-ext-data-regularization[torchjd]"'
    try:
        from torchjd import aggregation
    except ImportError as error:
        raise ImportError(f"method={name} comes from torchjd: {hint}") from error
    function = getattr(aggregation, TORCHJD[name])()

    def each(gram: Tensor) -> Tensor:
        flat = gram.reshape(-1, 2, 2)
        return torch.stack([function(one) for one in flat]).view(gram.shape[:-1])

    return each


def _positive(square: Tensor) -> Tensor:
    """A zero gradient conflicts with nothing: its inner products are zero too."""
    return square.clamp(min=torch.finfo(square.dtype).tiny)
