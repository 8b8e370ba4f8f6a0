"""w_i = T_tot / (label tokens of S) for i in S, else 0: S are the k samples with the largest s_i = <g_i, t>."""

from __future__ import annotations

import torch

from trl_ext_data_regularization.solvers.problem import Problem, Solution, subset


def count(n: int, frac: float) -> int:
    """k = max(1, int(n frac))."""
    return max(1, int(n * frac))


def topk(problem: Problem, frac: float = 0.5) -> Solution:
    """Keep the k = max(1, int(n frac)) largest s_i (arXiv:2605.07063, supervised fine-tuning, frac 0.5).

    u is the gradient of the token mean over S: a linear maximisation over k-subsets, not a Euclidean projection.

    Args:
        problem: (..., n); K is not needed.
        frac: share of the samples to keep, in (0, 1].
    """
    best = problem.s.topk(count(problem.n, frac), dim=-1).indices
    kept = torch.zeros_like(problem.s, dtype=torch.bool).scatter_(-1, best, True)
    return subset(problem, kept)
