"""pass@k without bias."""

from __future__ import annotations


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that k of n samples, drawn without replacement, hold one of c correct ones.

    Unbiased for the chance that k fresh samples do (arXiv:2107.03374, section 2.1).

    Raises:
        ValueError: not 1 <= k <= n or not 0 <= c <= n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k={k} is not in [1, n={n}]: draw at least k samples per problem")
    if not 0 <= c <= n:
        raise ValueError(f"c={c} is not in [0, n={n}]")
    missed = 1.0
    for i in range(k):  # C(n - c, k) / C(n, k), factor by factor; 0 as soon as k > n - c
        missed *= max(n - c - i, 0) / (n - i)
    return 1.0 - missed
