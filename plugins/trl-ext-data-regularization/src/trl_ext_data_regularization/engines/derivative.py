"""Scores as derivatives of the samples' losses along the target's gradient: forward passes only, any kind of layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trl_ext.gradients import GradientView, local_tensor


def derivative_scores(
    losses: Callable[[], Tensor],
    parameters: Sequence[nn.Parameter],
    target: Sequence[Tensor | None],
    step: float = 1e-3,
    points: int = 2,
    moved: Callable[[], None] = lambda: None,
) -> Tensor:
    """s_i = d/de loss_i(theta + e t) at 0, by a central difference. In global scope only, and without K.

    The parameters come back to the bit. While the losses are taken a copy of them is held. Under FSDP2 each rank moves
    and copies its own shards, so neither t nor the weights are ever whole; collective there.

    Args:
        losses: gives the (n,) float64 losses of the samples, without side effects.
        parameters: P trainable parameters, in fp32: in lower precision the difference drowns in rounding.
        target: P gradients (shards under FSDP2) or None each.
        step: length of the step along t / |t|, relative to the parameters' norm.
        points: 2, or 4 for an error of the fourth order at twice the forwards.
        moved: called whenever the parameters have changed (`drop_gathered_weights`).

    Returns:
        (n,) float64. Zeros where t is zero.
    """
    pairs = [(p, t) for p, t in zip(parameters, target, strict=True) if t is not None]
    if not pairs:
        return torch.zeros_like(losses())
    where, along = [p for p, _ in pairs], [t.to(p.dtype) for p, t in pairs]
    names = [""] * len(pairs)
    gram = GradientView(names, where, along).grams(GradientView(names, where, where)).sum(0)
    norm, size = gram.diagonal().sqrt().tolist()
    if norm == 0:
        return torch.zeros_like(losses())
    epsilon = step * max(size, 1.0) / norm
    weights = [local_tensor(p.detach()) for p in where]

    def slope(e: float) -> Tensor:
        with shifted(weights, along, e, moved):
            above = losses()
        with shifted(weights, along, -e, moved):
            below = losses()
        return (above - below) / (2 * e)

    return slope(epsilon) if points == 2 else (4 * slope(epsilon) - slope(2 * epsilon)) / 3


@contextmanager
def shifted(
    weights: Sequence[Tensor], direction: Sequence[Tensor], epsilon: float, moved: Callable[[], None]
) -> Iterator[None]:
    """A block inside which each weight w is w + epsilon t."""
    # Adding and then subtracting would leave rounding behind in the weights that are trained.
    saved = [w.clone() for w in weights]
    torch._foreach_add_(list(weights), list(direction), alpha=epsilon)
    moved()
    try:
        yield
    finally:
        torch._foreach_copy_(list(weights), saved)
        moved()
