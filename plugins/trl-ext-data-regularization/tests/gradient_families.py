"""Families of general gradients and targets, for the properties of the solvers."""

from dataclasses import dataclass

import torch
from torch import Tensor
from trl_ext_data_regularization.solvers import Problem


@dataclass(frozen=True)
class Case:
    """n samples' gradient shares as rows of G (n, P), and a target gradient t (P,)."""

    G: Tensor
    t: Tensor
    tokens: Tensor

    @property
    def problem(self) -> Problem:
        return Problem(self.G @ self.t, self.tokens, self.G @ self.G.T)

    @property
    def norm(self) -> Tensor:
        return self.t @ self.t

    def update(self, solution) -> Tensor:
        return solution.weights @ self.G + solution.target * self.t

    def distance(self, solution) -> float:
        return float((self.update(solution) - self.t).norm())


def case(seed: int, n: int, dimensions: int, unequal: bool = False, scale: float = 1.0) -> Case:
    """Token-mean gradients m_i ~ N(0, 1), and the shares tokens_i / T_tot of them."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(n, dimensions, generator=generator, dtype=torch.float64) * scale
    tokens = torch.randint(1, 30, (n,), generator=generator) if unequal else torch.full((n,), 7)
    t = torch.randn(dimensions, generator=generator, dtype=torch.float64) * scale
    return Case(means * (tokens / tokens.sum()).unsqueeze(1), t, tokens)


FAMILIES = {
    "wide": lambda seed: case(seed, 6, 40),
    "narrow": lambda seed: case(seed, 8, 3),
    "unequal": lambda seed: case(seed, 7, 5, unequal=True),
    "tiny": lambda seed: case(seed, 5, 12, unequal=True, scale=1e-6),
    "single": lambda seed: case(seed, 1, 4),
}
