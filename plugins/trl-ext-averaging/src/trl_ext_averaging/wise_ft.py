"""WiSE-FT: deployed are (1 - a) theta_0 + a theta, a point between the start and the fine-tuned weights.

theta_0 are the weights at `start`, theta those of the moment (arXiv:2109.01903, section 3). After SFT it restores the
pass@k that fine-tuning lost (arXiv:2504.10478).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from trl_ext.options import Range
from trl_ext_averaging.online import OnlineAverage
from trl_ext_averaging.shadows import Copies, CopyKind, widened

Share = Annotated[float, Range(ge=0, le=1)]


@dataclass(eq=False)
class WiseFt(OnlineAverage):
    """The interpolation between the start and the weights of the moment.

    Args:
        alpha: a, the share of the fine-tuned weights; a list gives a point for each value, named `wise_ft_<a>`, from
            the one copy of the start.

    Raises:
        ValueError: no alpha, one twice, or `every`, which has no meaning here.
    """

    alpha: Share | list[Share] = 0.5
    device: Literal["model", "cpu"] = field(default="cpu", kw_only=True)

    method: ClassVar[str] = "wise-ft"
    follows: ClassVar[bool] = False
    citation: ClassVar[str] = "Robust fine-tuning of zero-shot models, arXiv:2109.01903"
    cost: ClassVar[str] = "a copy of the weights, in host memory"

    def __post_init__(self) -> None:
        self._alphas = tuple(self.alpha) if isinstance(self.alpha, Sequence) else (self.alpha,)
        names = self.averages()
        if not names or len(set(names)) < len(names):
            raise ValueError(f"wise-ft: alpha={self.alpha!r} names no point, or one twice (names have six digits)")
        if self.every != 1:
            raise ValueError(f"wise-ft: every={self.every} has no meaning, the point moves with every step; remove it")
        super().__post_init__()

    def averages(self) -> tuple[str, ...]:
        return ("wise_ft",) if len(self._alphas) == 1 else tuple(f"wise_ft_{alpha:g}" for alpha in self._alphas)

    def copy_kinds(self) -> Mapping[str, CopyKind]:
        return {"start": "exact"}

    def deployed(self, name: str, copies: Copies, theta: list[Tensor]) -> Sequence[Tensor]:
        alpha = self._alphas[self.averages().index(name)]
        return torch._foreach_lerp(widened(copies["start"]), theta, alpha)
