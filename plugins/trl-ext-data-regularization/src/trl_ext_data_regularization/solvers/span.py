"""[extension] Euclidean projection onto the span of the general gradients."""

from __future__ import annotations

import torch

from trl_ext_data_regularization.solvers.problem import Problem, Solution


def span(problem: Problem) -> Solution:
    """w = K^+ s: the residual t - u is orthogonal to every g_i. An extension, not in the paper."""
    assert problem.K is not None
    K = problem.K.double()
    # Directions that only rounding made non-zero would get huge weights: Gram matrices square the condition number.
    inverse = torch.linalg.pinv(K, rtol=K.shape[-1] * 1e-9, hermitian=True)
    weights = (inverse @ problem.s.double().unsqueeze(-1)).squeeze(-1)
    return Solution(weights.to(problem.s.dtype), problem.s.new_zeros(problem.s.shape[:-1]))
