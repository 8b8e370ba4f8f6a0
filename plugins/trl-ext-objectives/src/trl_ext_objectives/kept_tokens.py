"""What the objectives that train on some of the label tokens share: two denominators, and the share that was kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import TokenRecord

Normalization = Literal["valid", "kept"]


def normalized(loss: Tensor, kept: Tensor, tokens: TokenRecord, normalization: Normalization) -> Tensor:
    """Keep the loss of the kept tokens, over the denominator that was asked for.

    "valid" leaves it as it is, and the core divides by all label tokens of the window. "kept" scales it so that the sum
    over the core's denominator becomes the mean over this micro-batch's kept tokens, averaged over the window's
    micro-batches and ranks, which is the reduction of arXiv 2510.00526.

    Args:
        loss: (B, T) float.
        kept: (B, T) bool, False where the mask is.

    Returns:
        (B, T) float, 0 for tokens that are not kept.
    """
    loss = loss * kept
    if normalization == "valid":
        return loss
    share: Tensor = tokens.denominator / (kept.sum().clamp(min=1) * tokens.accumulation_steps)
    return loss * share


class KeptShare:
    """Counts kept against valid tokens of this rank between two logs, without waiting for the device."""

    def __init__(self) -> None:
        self._sums: dict[bool, list[Tensor | int]] = {}

    def add(self, kept: Tensor, tokens: TokenRecord) -> None:
        """Count one micro-batch; `kept` is (B, T) bool, False where the mask is."""
        sums = self._sums.setdefault(tokens.training, [0, 0])
        sums[0] = sums[0] + kept.sum()
        sums[1] = sums[1] + tokens.mask.sum()

    def pop(self, mode: str) -> dict[str, float]:
        """The share since the last call, as `kept_share`; nothing where no token was counted."""
        kept, valid = self._sums.pop(mode == "train", (0, 0))
        return {"kept_share": float(kept / valid)} if valid else {}
