"""Target only: every direction is feasible; no regularisation by general data."""

from __future__ import annotations

import torch

from trl_ext_data_regularization.solvers.problem import Problem, Solution


def target(problem: Problem) -> Solution:
    """u = t (arXiv:2605.07063, section on special cases)."""
    return Solution(torch.zeros_like(problem.s), problem.s.new_ones(problem.s.shape[:-1]))
