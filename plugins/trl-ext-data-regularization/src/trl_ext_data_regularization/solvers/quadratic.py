"""The quadratic programs behind cone, hull and capped, by DAQP's exact active-set method."""

from __future__ import annotations

import daqp  # type: ignore[import-not-found,import-untyped,unused-ignore]
import numpy as np
import torch
from torch import Tensor

from trl_ext_data_regularization.solvers.problem import Problem, Solution

_EQUALITY = 5  # DAQP's code for an active, immutable constraint
_UNBOUNDED = 1e30  # DAQP's infinity
_RIDGES = (0.0, 1e-8, 1e-6)  # rounding in fp32 may leave a Gram matrix of unit size indefinite by 1e-7
_DUST = 1e-12  # of weights scaled to about 1: what rounding leaves where the exact solution is 0
# Far below the accuracy of scores in fp32; `eta_prox` ends the outer iterations for singular Gram matrices.
_TOLERANCES = {"primal_tol": 1e-10, "eta_prox": 1e-12}


def minimise(problem: Problem, upper: Tensor | None, simplex: bool) -> Solution:
    """min |sum_i v_i m_i - t|^2 over 0 <= v <= upper (and sum v = 1), m_i the token mean of sample i's gradient.

    Args:
        problem: with K.
        upper: (n,) upper bounds of v, or None.
        simplex: whether v must sum to 1.

    Returns:
        The weights of the shares, w_i = v_i T_tot / tokens_i. Samples without a label have none.

    Raises:
        ArithmeticError: a score is not finite.
    """
    assert problem.K is not None
    tokens = problem.tokens.double().cpu().numpy()
    labelled = np.flatnonzero(tokens > 0)
    scale = tokens.sum() / tokens[labelled] if len(labelled) else np.empty(0)
    bound = None if upper is None else upper.double().cpu().numpy()[labelled]
    n = problem.n
    s, K = problem.s.double().cpu().numpy().reshape(-1, n), problem.K.double().cpu().numpy().reshape(-1, n, n)
    weights = np.zeros_like(s)
    for layer in range(len(s) if len(labelled) else 0):
        means = K[layer][np.ix_(labelled, labelled)] * np.outer(scale, scale)
        weights[layer, labelled] = scale * _solve(means, s[layer, labelled] * scale, bound, simplex)
    return Solution(
        torch.from_numpy(weights).view(problem.s.shape).to(problem.s), problem.s.new_zeros(problem.s.shape[:-1])
    )


def _solve(K: np.ndarray, s: np.ndarray, upper: np.ndarray | None, simplex: bool) -> np.ndarray:
    """(n,) the minimiser of v'Kv/2 - s'v over the bounds."""
    n = len(s)
    if not np.isfinite(K).all() or not np.isfinite(s).all():
        raise ArithmeticError("scores of the general samples are not finite")
    # Of unit size, so that the solver's absolute tolerances mean the same whatever the size of gradients.
    size = max(np.abs(np.diag(K)).max(), np.finfo(float).tiny)
    if simplex:
        unit = np.ones(n)
        K, linear = K / size, -s / size
        above = np.concatenate([np.full(n, 1.0) if upper is None else upper, [1.0]])
        below = np.concatenate([np.zeros(n), [1.0]])
        rows, sense = np.ones((1, n)), np.array([0] * n + [_EQUALITY], dtype=np.int32)
    else:
        # A cone is the same whatever the lengths of its rays, which differ by many orders of magnitude once some
        # samples are learnt; on rays of length 1 the solver does not cycle.
        unit = 1 / np.sqrt(np.where(np.diag(K) > 0, np.diag(K), size))
        K, linear = K * np.outer(unit, unit), -s * unit
        length = np.abs(linear).max() or 1.0
        linear, unit = linear / length, unit * length
        above, below = np.full(n, _UNBOUNDED), np.zeros(n)
        rows, sense = np.empty((0, n)), np.zeros(n, dtype=np.int32)
    for ridge in _RIDGES:
        convex = np.ascontiguousarray(K + ridge * np.eye(n))
        solution, _, flag, _ = daqp.solve(
            convex, np.ascontiguousarray(linear), rows, above, below, sense.copy(), **_TOLERANCES
        )
        if flag > 0:
            solution = np.clip(solution, 0, None if upper is None else upper)
            return np.where(solution < _DUST, 0, solution) * unit
    raise ArithmeticError(f"the quadratic program over {n} samples has no solution (DAQP: {flag})")
