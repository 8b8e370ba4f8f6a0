"""Target only, w = 0 and a = 1: every direction is feasible; no regularisation by general data."""

from __future__ import annotations

import torch

from trl_ext_data_regularization.solvers.problem import Problem, Solution


def target(problem: Problem) -> Solution:
    """u = t, the gradient of the token mean over the target (arXiv:2605.07063, special cases)."""
    return Solution(torch.zeros_like(problem.s), problem.s.new_ones(problem.s.shape[:-1]))
