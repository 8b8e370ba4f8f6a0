"""Weights (a, b) of u = a t + b g from the Gram matrix of the target's gradient t and the mean general gradient g."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trl_ext.gradients import conflict_weight, pcgrad_weights

Weighting = Callable[[Tensor], Tensor]
"""(..., 2, 2) Gram matrix of (t, g) to (..., 2) weights (a, b)."""

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
    """The projection of t onto {u : <u, g> >= 0}: u = t - min(0, <t, g> / |g|^2) g (arXiv:1812.00420, equation 11).

    Args:
        gram: (..., 2, 2) float.

    Returns:
        (..., 2) float: 1, and a number of at least 0.
    """
    b = conflict_weight(gram[..., 0, 1], gram[..., 1, 1])
    return torch.stack([torch.ones_like(b), b], -1)


CLOSED_FORMS: dict[str, Weighting] = {"half-space": half_space, "pcgrad": pcgrad_weights}


def weighting(name: str) -> Weighting:
    """A weighting by name. Where a Gram matrix is NaN or infinite, so are the weights, and `nonfinite` decides.

    Raises:
        ImportError: it comes from torchjd, and torchjd or what it needs is not installed.
        ValueError: there is no such weighting.
    """
    if name in CLOSED_FORMS:
        return CLOSED_FORMS[name]
    if name not in TORCHJD:
        raise ValueError(f"{name!r} is not one of {', '.join((*CLOSED_FORMS, *TORCHJD))}")
    hint = "pip install 'torchjd[quadprog-projector]'"
    try:
        from torchjd import aggregation
    except ImportError as error:
        raise ImportError(f"method={name} comes from torchjd: {hint}") from error
    function = getattr(aggregation, TORCHJD[name])()

    def each(gram: Tensor) -> Tensor:
        flat = gram.reshape(-1, 2, 2)
        finite = torch.isfinite(flat).all((-1, -2)).unsqueeze(-1)
        weights = torch.stack([function(one) for one in torch.where(finite.unsqueeze(-1), flat, 0.0)])
        return torch.where(finite, weights, torch.nan).view(gram.shape[:-1])

    return each
