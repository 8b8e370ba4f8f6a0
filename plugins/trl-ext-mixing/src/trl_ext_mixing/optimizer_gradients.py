"""Gradients of a view in the form in which optimisers and TRL's clipping take them: parameter to gradient."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trl_ext.gradients import GradientView, as_sharded


def by_parameter(view: GradientView) -> dict[nn.Parameter, Tensor]:
    """The gradients that there are, as `parameter.grad` would hold them: a DTensor for a DTensor, sharing memory."""
    return {p: as_sharded(g, p) for p, g in zip(view.parameters, view.tensors, strict=True) if g is not None}


def clip_as_trl(gradients: Mapping[nn.Parameter, Tensor], max_norm: float) -> None:
    """Clip gradients in place by the very function that TRL's trainer uses on `p.grad`; 0 leaves them."""
    if max_norm <= 0:
        return
    before: dict[nn.Parameter, Tensor | None] = {p: p.grad for p in gradients}
    try:
        for p, g in gradients.items():
            p.grad = g
        torch.nn.utils.clip_grad_norm_(list(gradients), max_norm)
    finally:
        for p, old in before.items():
            p.grad = old


def extra_step(optimizer: torch.optim.Optimizer, gradients: Mapping[nn.Parameter, Tensor], lr_ratio: float) -> None:
    """One more step of the trainer's optimiser, at `lr_ratio` times its learning rates; `p.grad` is None afterwards."""
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        for p, g in gradients.items():
            p.grad = g
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * lr_ratio
        optimizer.step()
    finally:
        for p in gradients:
            p.grad = None
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr
