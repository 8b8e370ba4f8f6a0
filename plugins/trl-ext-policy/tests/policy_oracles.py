"""The formulas once more, in plain Python over lists: loops, subsets and no tensors."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from itertools import combinations

Numbers = Sequence[float]


def grpo(rewards: Sequence[float | None], scale: str, all_rewards: Sequence[float | None]) -> list[float]:
    """TRL's advantages of one group; None counts nowhere and has 0."""
    known = [r for r in rewards if r is not None]
    if not known:
        return [0.0] * len(rewards)
    among = known if scale == "group" else [r for r in all_rewards if r is not None]
    spread = statistics.stdev(among) if len(among) > 1 else 0.0
    divisor = 1.0 if scale == "none" else spread + 1e-4
    return [0.0 if r is None else (r - statistics.fmean(known)) / divisor for r in rewards]


def retained(rewards: Sequence[float | None], lengths: Sequence[int], k: int, metric: str) -> list[bool]:
    """GFPO's algorithm 1: sort by the metric, keep the first k."""
    score = {"length": lambda i: -lengths[i], "efficiency": lambda i: rewards[i] / lengths[i]}[metric]
    usable = [i for i, reward in enumerate(rewards) if reward is not None and lengths[i] > 0]
    best = sorted(usable, key=score, reverse=True)[:k]  # a stable sort, also in reverse
    return [i in best for i in range(len(rewards))]


def best_of_sets(rewards: Numbers, k: int) -> list[float]:
    """n times PKPO's estimate with the baseline of k - 1, over all sets of k that hold the completion."""
    n = len(rewards)
    found = []
    for i in range(n):
        total = 0.0
        for others in combinations([j for j in range(n) if j != i], k - 1):
            best = max(rewards[j] for j in others)
            total += max(rewards[i], best) - best
        found.append(n * total / math.comb(n, k))
    return found


def sets_as_samples(right: Sequence[bool], k: int) -> list[float]:
    """Pass@k training by its definition: GRPO on all sets of k, and a completion's mean over those that hold it."""
    n = len(right)
    sets = list(combinations(range(n), k))
    rewards = [float(any(right[i] for i in chosen)) for chosen in sets]
    mean, spread = statistics.fmean(rewards), statistics.pstdev(rewards)
    if spread == 0:
        return [0.0] * n
    return [
        statistics.fmean([(r - mean) / spread for r, chosen in zip(rewards, sets, strict=True) if i in chosen])
        for i in range(n)
    ]


def expectation(probabilities: Numbers, n: int, value: Callable[[tuple[int, ...]], Numbers]) -> list[float]:
    """The mean of a vector over all draws of n arms."""
    total = [0.0] * len(probabilities)

    def walk(drawn: tuple[int, ...], weight: float) -> None:
        if len(drawn) == n:
            for arm, v in enumerate(value(drawn)):
                total[arm] += weight * v
            return
        for arm, p in enumerate(probabilities):
            walk((*drawn, arm), weight * p)

    walk((), 1.0)
    return total


def conflict_weights(completions: Sequence[Sequence[int]], advantages: Numbers) -> list[list[int]]:
    """GTPO's lambda: walk from the start, and from the end, while a right and a wrong completion have the token."""
    found = [[1] * len(c) for c in completions]
    for back in (False, True):
        turned = [list(reversed(c)) if back else list(c) for c in completions]

        def has(t: int, token: int, sign: int, turned: list[list[int]] = turned) -> bool:
            return any(a * sign > 0 and t < len(c) and c[t] == token for c, a in zip(turned, advantages, strict=True))

        for i, completion in enumerate(turned):
            for t, token in enumerate(completion):
                if not (has(t, token, 1) and has(t, token, -1)):
                    break
                place = len(completion) - 1 - t if back else t
                if advantages[i] != 0:
                    found[i][place] = 2 if advantages[i] > 0 else 0
    return found


def gtpo(
    completions: Sequence[Sequence[int]], entropies: Sequence[Numbers], advantages: Numbers, gamma: float, start: float
) -> list[list[float]]:
    """A_it of one group, without padding."""
    found = []
    for i, weights in enumerate(conflict_weights(completions, advantages)):
        mean = statistics.fmean(entropies[i]) if entropies[i] else 0.0
        keep = 0.0 if start < math.log(2) < mean else 1.0
        found.append([w * keep * (advantages[i] - gamma * mean) for w in weights])
    return found


def entropy_rewards(entropies: Sequence[Numbers], right: Sequence[bool | None], alpha: float) -> list[list[float]]:
    """Eq. 3, 5 and 6 of arXiv 2508.04349 for one group, with both constants, without padding."""
    found = [[0.0] * len(h) for h in entropies]
    if True not in right or False not in right:
        return found
    for kind in (True, False):
        rows = [i for i, r in enumerate(right) if r is kind]
        shaped = {}
        for i in rows:
            for t, h in enumerate(entropies[i]):
                there = [entropies[k][t] for k in rows if t < len(entropies[k])]
                if kind:
                    shaped[i, t] = 1 + alpha * len(there) * h / sum(there)
                else:
                    shaped[i, t] = -1 - alpha * len(there) * (1 / h) / sum(1 / other for other in there)
        mean, spread = statistics.fmean(shaped.values()), statistics.pstdev(shaped.values())
        for (i, t), value in shaped.items():
            found[i][t] = (value - mean) / (spread + alpha * 1e-4)
    return found
