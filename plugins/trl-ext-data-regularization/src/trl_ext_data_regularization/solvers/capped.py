"""[extension] Euclidean projection onto the capped simplex, the hull with v_i <= cap_i: the relaxation of top-k."""

from __future__ import annotations

from trl_ext_data_regularization.solvers.problem import Problem, Solution
from trl_ext_data_regularization.solvers.quadratic import minimise
from trl_ext_data_regularization.solvers.topk import count


def capped(problem: Problem, frac: float = 0.5) -> Solution:
    """As `hull`, with v_i <= the largest share that sample i can have in a subset of k = max(1, int(n frac)).

    That cap is 1/k for samples of one length. With unequal lengths it is tokens_i / (tokens_i + the k - 1 smallest
    others), the tightest box that holds every k-subset's token mean. An extension, not in the paper.

    Args:
        problem: (..., n), with K.
        frac: share of the samples that k counts, in (0, 1].
    """
    tokens = problem.tokens.double()
    order = tokens.sort()
    k = count(problem.n, frac)
    smallest = order.values.cumsum(0)
    rank = order.indices.argsort()
    # Among the k smallest, the others are the rest of these k; for a longer sample, the k - 1 smallest.
    others = smallest[k - 1] - tokens if k > 1 else tokens * 0
    beyond = (smallest[k - 2] if k > 1 else tokens.new_zeros(())).expand_as(tokens)
    total = tokens + others.where(rank < k, beyond)
    cap = (tokens / total.clamp(min=1)).clamp(max=1)
    return minimise(problem, upper=cap, simplex=True)
