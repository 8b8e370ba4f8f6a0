"""Full training: the feasible set is one point, the mean general gradient; the target has no say."""

from __future__ import annotations

import torch

from trl_ext_data_regularization.solvers.problem import Problem, Solution


def full(problem: Problem) -> Solution:
    """w = 1 (arXiv:2605.07063, section on special cases)."""
    return Solution(torch.ones_like(problem.s), problem.s.new_zeros(problem.s.shape[:-1]))
