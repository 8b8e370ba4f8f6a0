"""Scores as derivatives of the samples' losses along the target's gradient: forward passes only, any kind of layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def derivative_scores(
    losses: Callable[[], Tensor],
    parameters: Sequence[nn.Parameter],
    target: Sequence[Tensor | None],
    step: float = 1e-3,
    points: int = 2,
) -> Tensor:
    """s_i = d/de loss_i(theta + e t) at 0, by a central difference. In global scope only, and without K.

    The parameters come back to the bit. While the losses are taken a copy of them is held.

    Args:
        losses: gives the (n,) float64 losses of the samples, without side effects.
        parameters: P trainable parameters, in fp32: in lower precision the difference drowns in rounding.
        target: P gradients or None each.
        step: length of the step along t / |t|, relative to the parameters' norm.
        points: 2, or 4 for an error of the fourth order at twice the forwards.

    Returns:
        (n,) float64. Zeros where t is zero.
    """
    pairs = [(p, t) for p, t in zip(parameters, target, strict=True) if t is not None]
    norm = _norm([t for _, t in pairs])
    if norm == 0:
        return torch.zeros_like(losses())
    epsilon = step * max(_norm([p.detach() for p, _ in pairs]), 1.0) / norm

    def slope(e: float) -> Tensor:
        with moved(pairs, e):
            above = losses()
        with moved(pairs, -e):
            below = losses()
        return (above - below) / (2 * e)

    return slope(epsilon) if points == 2 else (4 * slope(epsilon) - slope(2 * epsilon)) / 3


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack(torch._foreach_norm(list(tensors))).norm()) if tensors else 0.0


@contextmanager
def moved(pairs: Sequence[tuple[nn.Parameter, Tensor]], epsilon: float) -> Iterator[None]:
    """A block inside which each parameter p is p + epsilon t."""
    parameters, directions = [p.data for p, _ in pairs], [t.to(p.dtype) for p, t in pairs]
    # Adding and then subtracting would leave rounding behind in the weights that are trained.
    saved = [p.clone() for p in parameters]
    torch._foreach_add_(parameters, directions, alpha=epsilon)
    try:
        yield
    finally:
        torch._foreach_copy_(parameters, saved)
