"""[extension] Euclidean projection onto a ball around the mean gradient g: w = 1 - a, a = min(1, rho / |t - g|)."""

from __future__ import annotations

import torch

from trl_ext_data_regularization.solvers.problem import Problem, Solution, squared_distance


def ball(problem: Problem, squared_target_norm: torch.Tensor, radius: float = 1.0) -> Solution:
    """u = g + min(1, rho / |t - g|) (t - g), g = sum_i g_i, rho = radius x |g|. An extension, not in the paper.

    Args:
        problem: (..., n), with K.
        squared_target_norm: (...) |t|^2.
        radius: radius of the ball relative to the norm of the mean general gradient; 0 is full training.
    """
    assert problem.K is not None
    mean = Solution(torch.ones_like(problem.s), problem.s.new_zeros(problem.s.shape[:-1]))
    distance = squared_distance(problem, mean, squared_target_norm).clamp(min=0).sqrt()
    rho = radius * problem.K.sum((-1, -2)).clamp(min=0).sqrt()
    share = torch.where(distance > rho, rho / distance.clamp(min=torch.finfo(distance.dtype).tiny), 1.0)
    return Solution((1 - share).unsqueeze(-1).expand_as(problem.s).clone(), share)
