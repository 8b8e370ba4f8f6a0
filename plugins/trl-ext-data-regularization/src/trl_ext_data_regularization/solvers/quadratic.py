"""The quadratic programs behind cone, hull and capped, by DAQP's exact active-set method.

All are projections onto a cone, whose rays may have any length: on rays of length 1 the solver's absolute tolerances
mean the same for every sample, however far apart the lengths of their gradients are.
"""

from __future__ import annotations

import daqp  # type: ignore[import-not-found,import-untyped,unused-ignore]
import numpy as np
import torch
from torch import Tensor

from trl_ext_data_regularization.solvers.problem import Problem, Solution
from trl_ext_data_regularization.solvers.span import span

_UNBOUNDED = 1e30  # DAQP's infinity
_RIDGES = (0.0, 1e-8, 1e-6)  # rounding in fp32 may leave a Gram matrix of unit size indefinite by 1e-7
_DUST = 1e-12  # of weights scaled to about 1: what rounding leaves where the exact solution is 0
# Far below the accuracy of scores in fp32; `eta_prox` ends the outer iterations for singular Gram matrices.
_TOLERANCES = {"primal_tol": 1e-10, "eta_prox": 1e-12}


def minimise(problem: Problem, upper: Tensor | None, simplex: bool) -> Solution:
    """min |sum_i v_i m_i - t|^2 over 0 <= v <= upper (and sum v = 1), m_i the token mean of sample i's gradient.

    Args:
        problem: (..., n), with K.
        upper: (n,) upper bounds of v on the simplex, or None.
        simplex: whether v must sum to 1.

    Returns:
        The weights of the shares, w_i = v_i T_tot / tokens_i. Samples without a label have none.

    Raises:
        ArithmeticError: DAQP finds no solution.
    """
    assert problem.K is not None
    tokens = problem.tokens.double().cpu().numpy()
    labelled = np.flatnonzero(tokens > 0)
    scale = tokens.sum() / tokens[labelled] if len(labelled) else np.empty(0)
    bound = None if upper is None else upper.double().cpu().numpy()[labelled]
    n = problem.n
    s, K = problem.s.double().cpu().numpy().reshape(-1, n), problem.K.double().cpu().numpy().reshape(-1, n, n)
    reach = _squared_norm_in_span(problem) if simplex else None
    weights = np.zeros_like(s)
    for layer in range(len(s) if len(labelled) else 0):
        means, along = K[layer][np.ix_(labelled, labelled)] * np.outer(scale, scale), s[layer, labelled] * scale
        v = _onto_cone(means, along) if reach is None else _onto_simplex(means, along, reach[layer], bound)
        weights[layer, labelled] = scale * v
    return Solution(
        torch.from_numpy(weights).view(problem.s.shape).to(problem.s), problem.s.new_zeros(problem.s.shape[:-1])
    )


def _squared_norm_in_span(problem: Problem) -> np.ndarray:
    """(L,) float64 s' K^+ s: the squared norm of the part of t that is in the span of the general gradients."""
    return (span(problem).weights * problem.s).sum(-1).double().clamp(min=0).cpu().numpy().reshape(-1)


def _onto_simplex(K: np.ndarray, s: np.ndarray, reach: float, upper: np.ndarray | None) -> np.ndarray:
    """(n,) the minimiser v of v'Kv/2 - s'v over 0 <= v <= upper, sum v = 1.

    The closest point of a convex set to t is that of the set minus t to 0; and that lies on the ray of the cone of all
    (x - t, c) which is closest to (0, 1), for any c > 0 (Lawson and Hanson, least distance programming). Only the part
    of t in the span matters, whose squared norm is `reach`.
    """
    height = max(reach, np.diag(K).min(), np.finfo(float).eps * np.diag(K).max(), np.finfo(float).tiny)  # c^2
    moved = K - s[:, None] - s[None, :] + reach + height
    rows = None if upper is None else np.eye(len(s)) - upper[:, None]  # v_i <= upper_i sum v
    v = _onto_cone(moved, np.full(len(s), height), rows)
    return v / v.sum()


def _onto_cone(K: np.ndarray, s: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
    """(n,) the minimiser v of v'Kv/2 - s'v over v >= 0, and rows (m, n) v <= 0 where there are any."""
    n, square = len(s), np.diag(K)
    unit = 1 / np.sqrt(np.where(square > 0, square, max(square.max(), np.finfo(float).tiny)))
    K, linear = K * np.outer(unit, unit), -s * unit
    size = np.abs(linear).max() or 1.0
    linear, unit = linear / size, unit * size
    rows = np.empty((0, n)) if rows is None else rows * unit
    rows = rows / np.maximum(np.abs(rows).max(axis=1, keepdims=True), np.finfo(float).tiny)
    above = np.concatenate([np.full(n, _UNBOUNDED), np.zeros(len(rows))])
    below = np.concatenate([np.zeros(n), np.full(len(rows), -_UNBOUNDED)])
    for ridge in _RIDGES:
        convex = np.ascontiguousarray(K + ridge * np.eye(n))
        sense = np.zeros(n + len(rows), dtype=np.int32)
        solution, _, flag, _ = daqp.solve(
            convex, np.ascontiguousarray(linear), np.ascontiguousarray(rows), above, below, sense, **_TOLERANCES
        )
        if flag > 0:
            return np.where(solution < _DUST, 0, solution) * unit
    raise ArithmeticError(f"the quadratic program over {n} samples has no solution (DAQP: {flag})")
