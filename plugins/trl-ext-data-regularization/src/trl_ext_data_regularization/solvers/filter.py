"""w_i = T_tot / (label tokens of S) for i in S, else 0: S are the samples that do not work against the target."""

from __future__ import annotations

import torch

from trl_ext_data_regularization.solvers.problem import Problem, Solution, subset


def filter_negative(problem: Problem, frac: float = 1.0) -> Solution:
    """Keep s_i >= 0 and drop the int(frac x number of negatives) most negative (arXiv:2605.07063, policy gradient).

    u is the gradient of the token mean over S, and zero where S is empty.

    Args:
        problem: (..., n); K is not needed.
        frac: share of the negative samples to drop, in [0, 1].
    """
    negatives = (problem.s < 0).sum(-1, keepdim=True)
    # The product in float64, as Python's int(frac * count) would have it.
    dropped = (negatives.double() * frac).long()
    rank = problem.s.argsort(dim=-1).argsort(dim=-1)  # 0 for the most negative
    return subset(problem, torch.logical_or(rank >= dropped, problem.s >= 0))
