"""What rollouts and demonstrations say about the reach of a policy: pure functions on arrays."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize  # type: ignore[import-untyped]
from scipy.special import betaln  # type: ignore[import-untyped]

from trl_ext_probing.intervals import Floats


def likelihood_quantile(log_likelihoods: ArrayLike, epsilon: ArrayLike) -> Floats:
    """log Q(eps), with Q(eps) = sup {alpha <= 1 : share of prompts with likelihood <= alpha is at most eps}.

    Of n prompts up to floor(eps n) may lie at or below alpha, so the supremum is the likelihood of the next one. The
    token-level curve is the same function of min_t log p_t (arXiv 2603.06957, sections on both rewards).

    Args:
        log_likelihoods: (n,) natural logarithms of the likelihood of the correct answer, -inf allowed.
        epsilon: shares in [0, 1], any shape.
    """
    ordered = np.sort(np.asarray(log_likelihoods, dtype=float))
    if ordered.size == 0:
        raise ValueError("a quantile needs at least one likelihood")
    # 1e-9: 0.3 * 10 is 2.9999999999999996.
    below = np.floor(np.asarray(epsilon, dtype=float) * ordered.size + 1e-9).astype(int)
    return np.append(ordered, 0.0)[np.minimum(below, ordered.size)]


class BetaPrior(NamedTuple):
    """A beta distribution of success rates over prompts."""

    a: float
    b: float

    def reached(self, successes: ArrayLike, trials: ArrayLike, draws: ArrayLike) -> Floats:
        """Probability of at least one success in `draws` further draws of a prompt, given its trials.

        1 - E[(1 - p)^draws] under the posterior Beta(a + successes, b + failures).
        """
        k, n = np.asarray(successes, dtype=float), np.asarray(trials, dtype=float)
        a, b = self.a + k, self.b + n - k
        return -np.expm1(betaln(a, b + np.asarray(draws)) - betaln(a, b))

    def informative_group(self, successes: ArrayLike, trials: ArrayLike, num_generations: int) -> Floats:
        """Probability that a group has a success and a failure, and so an advantage, given a prompt's trials.

        1 - E[(1 - p)^G] - E[p^G] under the posterior. With the share of successes in place of p it would be too small:
        few trials make rates look more certain than they are.
        """
        k, n = np.asarray(successes, dtype=float), np.asarray(trials, dtype=float)
        all_correct = 1 - BetaPrior(self.b, self.a).reached(n - k, n, num_generations)
        return np.maximum(self.reached(k, n, num_generations) - all_correct, 0.0)

    def mean(self, successes: ArrayLike, trials: ArrayLike) -> Floats:
        """Mean of the success rate of a prompt, given its trials: (a + successes) / (a + b + trials)."""
        k, n = np.asarray(successes, dtype=float), np.asarray(trials, dtype=float)
        return (self.a + k) / (self.a + self.b + n)


def fit_prior(successes: ArrayLike, trials: ArrayLike) -> BetaPrior:
    """The beta distribution under which the counts of all prompts are likeliest (beta-binomial likelihood).

    Many prompts at exactly 0 and some near 1, the usual picture, give a small `a` and `b`. Both are kept in
    [1e-3, 1e3], where prompts of one rate, or counts that are all 0, would drive them to the end of the line.
    """
    k, n = np.asarray(successes, dtype=float), np.asarray(trials, dtype=float)
    if k.size == 0 or n.sum() == 0:
        raise ValueError("a prior of success rates needs at least one trial")

    def negative_log_likelihood(logs: Floats) -> float:
        a, b = np.exp(logs)
        return -float((betaln(a + k, b + n - k) - betaln(a, b)).sum())

    bound = (math.log(1e-3), math.log(1e3))
    fit = minimize(negative_log_likelihood, np.zeros(2), method="L-BFGS-B", bounds=[bound, bound])
    return BetaPrior(*np.exp(fit.x).tolist())
