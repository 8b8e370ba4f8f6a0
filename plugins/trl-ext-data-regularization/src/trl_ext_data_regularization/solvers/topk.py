"""The subset of the k samples best aligned with the target."""

from __future__ import annotations

import torch

from trl_ext_data_regularization.solvers.problem import Problem, Solution, subset


def count(n: int, frac: float) -> int:
    """k = max(1, int(n frac))."""
    return max(1, int(n * frac))


def topk(problem: Problem, frac: float = 0.5) -> Solution:
    """Keep the k largest s_i: a linear maximisation over k-subsets, not a Euclidean projection (arXiv:2605.07063).

    Args:
        problem: the problem.
        frac: share of the samples to keep, in (0, 1].
    """
    best = problem.s.topk(count(problem.n, frac), dim=-1).indices
    kept = torch.zeros_like(problem.s, dtype=torch.bool).scatter_(-1, best, True)
    return subset(problem, kept)
