"""Solvers: pure functions of scores s, Gram matrix K and token counts to the weights w of u = sum_i w_i g_i + a t.

One file each, with its formula. All take a `Problem` and give a `Solution`, which say the shapes and the scale.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trl_ext_data_regularization.solvers.ball import ball
from trl_ext_data_regularization.solvers.capped import capped
from trl_ext_data_regularization.solvers.cone import cone
from trl_ext_data_regularization.solvers.filter import filter_negative
from trl_ext_data_regularization.solvers.full import full
from trl_ext_data_regularization.solvers.hull import hull
from trl_ext_data_regularization.solvers.problem import Problem, Solution, squared_distance, subset
from trl_ext_data_regularization.solvers.second_order import second_order
from trl_ext_data_regularization.solvers.span import span
from trl_ext_data_regularization.solvers.target import target
from trl_ext_data_regularization.solvers.topk import count, topk

__all__ = ["RULES", "Problem", "Rule", "Solution", "count", "squared_distance", "subset"]

RULES = ("full", "target", "topk", "filter", "second-order", "span", "cone", "hull", "capped", "ball")
GRAM_RULES = frozenset({"second-order", "span", "cone", "hull", "capped", "ball"})


@dataclass(frozen=True)
class Rule:
    """A solver by name, with its settings."""

    name: str
    frac: float
    radius: float = 1.0

    @property
    def needs_gram(self) -> bool:
        """Whether the solver wants the inner products among general samples."""
        return self.name in GRAM_RULES

    @property
    def equal(self) -> bool:
        """Whether all samples that have a weight have the same one."""
        return self.name in ("full", "target", "topk", "filter", "second-order")

    def kept(self, n: int) -> int | None:
        """Number of n samples that have a weight, where it does not depend on the scores."""
        if self.name in ("topk", "second-order"):
            return count(n, self.frac)
        return {"full": n, "target": 0}.get(self.name)

    @property
    def uses_target(self) -> bool:
        """Whether the update contains the target's gradient itself."""
        return self.name in ("target", "ball")

    def solve(self, problem: Problem, squared_target_norm: Tensor, lr: float) -> Solution:
        """Apply the solver. Where a layer's scores are NaN or infinite, so are its weights: no order says what to keep.

        Args:
            problem: the problem, of one layer or of several.
            squared_target_norm: (...) |t|^2, for `ball`.
            lr: learning rate of the step, for `second-order`.
        """
        if self.name in ("full", "target"):  # the scores have no say
            return full(problem) if self.name == "full" else target(problem)
        finite = torch.isfinite(problem.s).all(-1)
        if problem.K is not None:
            finite = finite & torch.isfinite(problem.K).all((-1, -2))
        s = torch.where(finite.unsqueeze(-1), problem.s, 0.0)
        K = None if problem.K is None else torch.where(finite[..., None, None], problem.K, 0.0)
        found = self._solve(replace(problem, s=s, K=K), squared_target_norm, lr)
        return Solution(
            torch.where(finite.unsqueeze(-1), found.weights, torch.nan), torch.where(finite, found.target, torch.nan)
        )

    def _solve(self, problem: Problem, squared_target_norm: Tensor, lr: float) -> Solution:
        match self.name:
            case "topk":
                return topk(problem, self.frac)
            case "filter":
                return filter_negative(problem, self.frac)
            case "second-order":
                return second_order(problem, self.frac, lr)
            case "span":
                return span(problem)
            case "cone":
                return cone(problem)
            case "hull":
                return hull(problem)
            case "capped":
                return capped(problem, self.frac)
            case "ball":
                return ball(problem, squared_target_norm, self.radius)
        raise ValueError(f"rule={self.name!r} is not one of {', '.join(RULES)}")
