"""w_i = T_tot / (label tokens of S) for i in S, else 0: S grows by the largest s_i - lr sum_{j in S} K_ij, k times."""

from __future__ import annotations

import torch

from trl_ext_data_regularization.solvers.problem import Problem, Solution, subset
from trl_ext_data_regularization.solvers.topk import count


def second_order(problem: Problem, frac: float = 0.5, lr: float = 1e-3) -> Solution:
    """Start from s; k = max(1, int(n frac)) times: take the largest, subtract lr K of it from the others.

    The greedy choice of arXiv:2605.07063, whose lr s and lr^2 K are these times lr: the same choice for every lr > 0,
    and `topk`'s at lr = 0, where a warm-up begins. A greedy projection of t onto {lr sum_S g_i} without the self-term
    lr^2 K_ii / 2. u is the gradient of the token mean over S.

    Args:
        problem: (..., n), with K.
        frac: share of the samples to keep, in (0, 1].
        lr: learning rate of the step, at least 0.
    """
    assert problem.K is not None
    gain = problem.s
    kept = torch.zeros_like(gain, dtype=torch.bool)
    for _ in range(count(problem.n, frac)):
        best = gain.masked_fill(kept, -torch.inf).argmax(-1, keepdim=True)
        kept = kept.scatter(-1, best, True)
        row = problem.K.gather(-2, best.unsqueeze(-1).expand(*best.shape, problem.n)).squeeze(-2)
        gain = gain - lr * row
    return subset(problem, kept)
