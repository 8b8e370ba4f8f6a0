"""`pass-at-k`: GRPO's advantages of sets of k completions, in closed form (arXiv 2508.10751, section 2.4).

Every set of k of the n completions of a prompt is a sample of GRPO, right if any of its completions is. With n_neg
wrong completions, the mean R and the spread s of all sets, and a completion's advantage as the mean over its sets:

    R = 1 - C(n_neg, k) / C(n, k),    s = sqrt(R (1 - R))

    A_right = (1 - R) / s
    A_wrong = (1 - R - C(n_neg - 1, k - 1) / C(n - 1, k - 1)) / s
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb, sqrt
from typing import ClassVar

import torch
from torch import Tensor

from trl_ext_policy.sets import SetsOfK


def set_advantages(right: Tensor, k: int) -> Tensor:
    """(n,) double: the advantages of a group; 0 where all sets of k are alike.

    Args:
        right: (n,) bool: whether a completion is correct.
        k: completions of a set, at most n.
    """
    n, wrong = len(right), int((~right).sum())
    failed = comb(wrong, k) / comb(n, k)
    if failed in (0, 1):
        return torch.zeros(n, dtype=torch.float64)
    spread = sqrt(failed * (1 - failed))
    of_right = failed / spread
    of_wrong = (failed - comb(wrong - 1, k - 1) / comb(n - 1, k - 1)) / spread
    return torch.full((n,), of_wrong, dtype=torch.float64).masked_fill_(right, of_right)


@dataclass(eq=False, kw_only=True)
class PassAtK(SetsOfK):
    """Pass@k training: GRPO with sets of k completions in the place of completions.

    The division by the spread makes it a shaped advantage, not an unbiased gradient of pass@k, which is `pkpo`. It is
    already scaled, so that `scale_rewards` does not act.

    Args:
        k: completions of a set, up to `num_generations`; with 1 it is GRPO. May be a schedule such as "linear:8:1".
        success: reward from which a completion counts as correct.
    """

    success: float = 1.0

    citation: ClassVar[str] = "Chen et al., Pass@k Training, arXiv 2508.10751"

    def of_group(self, rewards: Tensor, k: int) -> Tensor:
        return set_advantages(rewards >= self.success, k)
