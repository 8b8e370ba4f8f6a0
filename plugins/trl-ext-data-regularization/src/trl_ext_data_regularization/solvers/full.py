"""Full training, w = 1: the feasible set is one point, the mean general gradient; the target has no say."""

from __future__ import annotations

import torch

from trl_ext_data_regularization.solvers.problem import Problem, Solution


def full(problem: Problem) -> Solution:
    """w_i = 1, so u = sum_i g_i, the gradient of the token mean over all samples (arXiv:2605.07063, special cases)."""
    return Solution(torch.ones_like(problem.s), problem.s.new_zeros(problem.s.shape[:-1]))
