"""[extension] Euclidean projection onto the convex hull of the samples' mean gradients m_i = (T_tot / tokens_i) g_i."""

from __future__ import annotations

from trl_ext_data_regularization.solvers.problem import Problem, Solution
from trl_ext_data_regularization.solvers.quadratic import minimise


def hull(problem: Problem) -> Solution:
    """min |sum_i v_i m_i - t| over v >= 0, sum v = 1, where m_i is the token mean of sample i's gradient.

    In weights of shares, w_i = v_i T_tot / tokens_i, so that the plain update (w = 1) and every subset mean are inside
    the hull. An extension, not in the paper.

    Args:
        problem: (..., n), with K.
    """
    return minimise(problem, upper=None, simplex=True)
