"""CHORD's token weight phi: `-sg[p (1 - p)] log p` (arXiv 2508.11408).

It learns neither what is known nor what is far off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trl_ext import hookimpl
from trl_ext_objectives.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import TokenRecord


@dataclass(eq=False)
class ChordPhi(Objective):
    """Weigh each token by p (1 - p), largest at p = 1/2. In gradient, `huber` with delta = 1.

    With `chord` of trl-ext-mixing it weighs the demonstrations, as in the paper: `plugins: [chord, chord-phi]`.
    """

    citation: ClassVar[str] = "CHORD: On-Policy RL Meets Off-Policy Experts, arXiv 2508.11408"

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T) in [0, 0.261] nats (arXiv 2508.11408).

        The core's denominator is all label tokens of the window, or of the stream's batch.
        """
        return -(tokens.probs * tokens.one_minus_probs).detach() * tokens.log_probs
