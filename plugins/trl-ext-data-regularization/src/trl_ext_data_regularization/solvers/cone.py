"""[extension] Euclidean projection onto the cone of the general gradients: min |sum_i w_i g_i - t| over w >= 0."""

from __future__ import annotations

from trl_ext_data_regularization.solvers.problem import Problem, Solution
from trl_ext_data_regularization.solvers.quadratic import minimise


def cone(problem: Problem) -> Solution:
    """The weights (..., n) of the shares g_i that are closest to t. An extension, not in the paper.

    Args:
        problem: (..., n), with K.
    """
    return minimise(problem, upper=None, simplex=False)
