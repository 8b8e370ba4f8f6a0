"""[extension] Euclidean projection onto the span of the general gradients: w = K^+ s."""

from __future__ import annotations

import torch

from trl_ext_data_regularization.solvers.problem import Problem, Solution


def span(problem: Problem) -> Solution:
    """w = K^+ s: the residual t - u is orthogonal to every g_i. An extension, not in the paper.

    The span does not depend on the lengths of the g_i, which differ by many orders of magnitude once some samples are
    learnt. So K is taken of gradients of length 1, and only directions that are alike are counted as one.

    Args:
        problem: (..., n), with K.
    """
    assert problem.K is not None
    K = problem.K.double()
    length = K.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    unit = torch.where(length > 0, 1 / length, 0.0)
    cosines = unit.unsqueeze(-1) * K * unit.unsqueeze(-2)
    # Directions that only rounding made non-zero would get huge weights: Gram matrices square the condition number.
    inverse = torch.linalg.pinv(cosines, rtol=K.shape[-1] * 1e-9, hermitian=True)
    weights = unit * (inverse @ (unit * problem.s.double()).unsqueeze(-1)).squeeze(-1)
    return Solution(weights.to(problem.s.dtype), problem.s.new_zeros(problem.s.shape[:-1]))
