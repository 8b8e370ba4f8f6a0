"""What a solver receives and gives: u = sum_i w_i g_i + a t, for one layer or for L of them, on a leading dimension."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """One layer's choice among n general samples, or one for each of L layers (a leading dimension).

    g_i is the gradient of sample i's *share* of the token-mean loss, so that the plain update is sum_i g_i.
    """

    s: Tensor
    """(..., n) float: <g_i, t>, t the target's gradient."""
    tokens: Tensor
    """(n,) label tokens of each sample."""
    K: Tensor | None = None
    """(..., n, n) float: <g_i, g_j>; None for the solvers that do without."""

    @property
    def n(self) -> int:
        """Number of general samples."""
        return self.s.shape[-1]


@dataclass(frozen=True)
class Solution:
    """The update u = sum_i weights_i g_i + target t. All weights 1 and target 0 are plain training."""

    weights: Tensor
    """(..., n) float, in the dtype of `s`."""
    target: Tensor
    """(...) float: coefficient of the target's gradient itself."""


def subset(problem: Problem, kept: Tensor) -> Solution:
    """The gradient of the token-mean loss on the kept samples alone: each share times T_tot / tokens kept.

    Args:
        problem: the problem.
        kept: (..., n) bool. Where nothing with a label is kept, the update is zero.
    """
    tokens = problem.tokens.to(problem.s.dtype)
    left = (kept * tokens).sum(-1, keepdim=True)
    scale = torch.where(left > 0, tokens.sum() / left.clamp(min=1), torch.zeros_like(left))
    return Solution(kept * scale, problem.s.new_zeros(problem.s.shape[:-1]))


def squared_distance(problem: Problem, solution: Solution, squared_target_norm: Tensor) -> Tensor:
    """(...) |u - t|^2 of a solution, by the Gram matrix alone.

    Args:
        problem: with K.
        solution: weights, and the target's coefficient a: u - t = sum_i w_i g_i - (1 - a) t.
        squared_target_norm: (...) |t|^2.
    """
    assert problem.K is not None
    w, rest = solution.weights, 1 - solution.target
    quadratic = torch.einsum("...i,...ij,...j->...", w, problem.K, w)
    return quadratic - 2 * rest * (w * problem.s).sum(-1) + rest * rest * squared_target_norm
