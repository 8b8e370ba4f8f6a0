"""How many draws a prompt takes until it is solved, against the theory's 1/alpha."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from trl_ext_probing.reachability.statistics import expected_queries

EDGES = (1.0, *(10 ** (i / 2) for i in range(1, 20)))
"""Of the bins of 1/alpha."""


def draws_until_solved(
    draw: Callable[[list[int]], Sequence[bool]], prompts: int, limit: int, at_once: int = 8
) -> np.ndarray:
    """(prompts,) number of the draw that solved each prompt first, from 1; 0 where none of `limit` did.

    Args:
        draw: for a list of prompt numbers, with repeats, one draw each: whether it is a success.
        prompts: how many there are.
        limit: most draws of a prompt.
        at_once: draws of a prompt between looks. Draws after the first success are thrown away, so that the number
            does not depend on it.
    """
    first = np.zeros(prompts, dtype=int)
    done = 0
    while done < limit and not first.all():
        now = min(at_once, limit - done)
        left = np.flatnonzero(first == 0)
        hits = np.array(draw(left.repeat(now).tolist()), dtype=bool).reshape(len(left), now)
        solved = hits.any(axis=1)
        first[left[solved]] = done + 1 + hits[solved].argmax(axis=1)
        done += now
    return first


def query_ratios(alphas: ArrayLike, draws: ArrayLike, limit: int, confidence: float = 0.95) -> list[dict[str, Any]]:
    """Draws until the first success over what theory expects, for prompts in bins of half a decade of 1/alpha.

    Expected are (1 - (1 - alpha)^limit) / alpha draws: 1/alpha but for the limit, to which prompts that were never
    solved count (arXiv 2603.06957: 1/alpha reward queries on samples with base likelihood alpha).

    Args:
        alphas: (n,) success rates, known from elsewhere than these draws, above 0.
        draws: (n,) from `draws_until_solved`.
        limit: most draws of a prompt there.
        confidence: of the interval, by resampling prompts 2,000 times.

    Returns:
        For each bin with prompts `from` and `to` (of 1/alpha), `prompts`, how many were `unsolved`, `mean_draws`,
        `expected`, their `ratio` and its `interval`.
    """
    p, counts = np.asarray(alphas, dtype=float), np.asarray(draws)
    unsolved = counts == 0
    spent, expected = np.where(unsolved, limit, counts), expected_queries(p, limit)
    rng = np.random.default_rng(0)
    found = []
    for low, high in pairwise(EDGES):
        mine = np.flatnonzero((1 / p >= low) & (1 / p < high))
        if not len(mine):
            continue
        again = rng.choice(mine, (2000, len(mine)))
        ratios = spent[again].sum(axis=1) / expected[again].sum(axis=1)
        tail = (1 - confidence) / 2
        found.append(
            {
                "from": low,
                "to": high,
                "prompts": len(mine),
                "unsolved": int(unsolved[mine].sum()),
                "mean_draws": float(spent[mine].mean()),
                "expected": float(expected[mine].mean()),
                "ratio": float(spent[mine].sum() / expected[mine].sum()),
                "interval": np.quantile(ratios, [tail, 1 - tail]).tolist(),
            }
        )
    return found


def describe_queries(bins: Sequence[Mapping[str, Any]]) -> str:
    """The bins of `query_ratios` as a table in Markdown."""
    lines = ["| 1/alpha | prompts | never solved | mean draws | expected | ratio (95 %) |", "|---" * 6 + "|"]
    lines += [
        f"| {b['from']:.3g} to {b['to']:.3g} | {b['prompts']} | {b['unsolved']} | {b['mean_draws']:.1f} "
        f"| {b['expected']:.1f} | {b['ratio']:.2f} ({b['interval'][0]:.2f} to {b['interval'][1]:.2f}) |"
        for b in bins
    ]
    return "\n".join(lines)
