"""[extension] Euclidean projection onto the cone of the general gradients."""

from __future__ import annotations

from trl_ext_data_regularization.solvers.problem import Problem, Solution
from trl_ext_data_regularization.solvers.quadratic import minimise


def cone(problem: Problem) -> Solution:
    """min |sum_i w_i g_i - t| over w >= 0. An extension, not in the paper."""
    return minimise(problem, upper=None, simplex=False)
