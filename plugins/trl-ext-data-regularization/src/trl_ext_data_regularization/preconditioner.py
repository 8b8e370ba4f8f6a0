"""Gradients as the optimiser sees them: divided by Adam's running root mean square."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trl_ext.gradients import local_tensor


def refuse_without_second_moments(optimizer: torch.optim.Optimizer) -> None:
    """Refuse, before the first step, an optimiser that is no Adam.

    Raises:
        ValueError: it has no `betas` and `eps`.
    """
    if any("betas" not in group or "eps" not in group for group in optimizer.param_groups):
        raise ValueError(
            f"precondition=True needs second moments, and {type(optimizer).__name__} has none; set optim=adamw_torch, "
            "or leave precondition"
        )


def preconditioned(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """g / (sqrt(v / (1 - beta2^k)) + eps), elementwise, for k optimiser steps done; g itself before the first.

    Args:
        optimizer: Adam or AdamW of torch, or one with the same state.
        parameters: P parameters.
        gradients: P gradients or None each.

    Raises:
        ValueError: the optimiser has no second moments.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    out: list[Tensor | None] = []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        state = optimizer.state.get(parameter, {})
        if gradient is None or not state:
            out.append(gradient)
            continue
        if "exp_avg_sq" not in state:
            raise ValueError(
                f"precondition=True needs second moments (Adam, AdamW), and {type(optimizer).__name__} has none"
            )
        group = groups[id(parameter)]
        correction = 1 - group["betas"][1] ** float(state["step"])
        second = local_tensor(state["exp_avg_sq"]).float() / correction
        out.append(gradient.float() / (second.sqrt() + group["eps"]))
    return out
