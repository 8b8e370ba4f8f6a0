"""WiSE-FT: deploy a point between the start and the fine-tuned weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from trl_ext_averaging.online import Copies, OnlineAverage, widened


@dataclass(eq=False)
class WiseFt(OnlineAverage):
    """(1 - a) theta_start + a theta, with the weights of the moment; theta_start are those at `start`.

    After SFT it restores the pass@k that fine-tuning lost (arXiv:2504.10478).

    Args:
        alpha: share of the fine-tuned weights, in [0, 1]; a list gives a point for each value, named `wise_ft_<a>`,
            from the one copy of the start.
    """

    alpha: float | list[float] = 0.5
    device: Literal["model", "cpu"] = field(default="cpu", kw_only=True)

    method: ClassVar[str] = "wise-ft"
    follows: ClassVar[bool] = False
    citation: ClassVar[str] = "Robust fine-tuning of zero-shot models, arXiv:2109.01903"

    def __post_init__(self) -> None:
        self._alphas = tuple(self.alpha) if isinstance(self.alpha, Sequence) else (self.alpha,)
        if not self._alphas or len(set(self._alphas)) < len(self._alphas):
            raise ValueError(f"wise-ft: alpha={self.alpha!r} names no point, or one twice")
        for alpha in self._alphas:
            if not 0 <= alpha <= 1:
                raise ValueError(f"wise-ft: alpha={alpha!r} is not in [0, 1]")
        if self.every != 1:
            raise ValueError(f"wise-ft: every={self.every} has no meaning, the point moves with every step; remove it")
        super().__post_init__()

    def averages(self) -> tuple[str, ...]:
        return ("wise_ft",) if len(self._alphas) == 1 else tuple(f"wise_ft_{alpha:g}" for alpha in self._alphas)

    def copy_dtypes(self) -> Mapping[str, Literal["wide", "exact"]]:
        return {"start": "exact"}

    def deployed(self, name: str, copies: Copies, theta: list[Tensor]) -> Sequence[Tensor]:
        alpha = self._alphas[self.averages().index(name)]
        return torch._foreach_lerp(widened(copies["start"]), theta, alpha)
