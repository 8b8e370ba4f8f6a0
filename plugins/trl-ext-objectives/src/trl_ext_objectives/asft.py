"""ASFT: `-sg[p] log p + beta KL(p_ref || p)`, DFT anchored to a reference over the whole vocabulary (arXiv 2509.23753).

The authors' README takes beta = 0.05, which is the default here; their scripts, and LLaMA-Factory's version, default
to 0.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Annotated, ClassVar

from trl_ext import hookimpl
from trl_ext.options import Range
from trl_ext.schedules import Scheduled
from trl_ext_objectives.dft import DFT
from trl_ext_objectives.live_reference import LiveReference
from trl_ext_objectives.reference_divergence import ReferenceDivergence
from trl_ext_objectives.reference_objective import ReferenceObjective

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import RunDescription, SetupContext, TokenRecord


@dataclass(eq=False)
class ASFT(ReferenceObjective):
    """Anchored SFT: DFT, kept near a reference.

    Costs one forward of the reference, and one of the model's LM head.

    Args:
        reference: `start`, `base` or `model:PATH`; a cache holds no distributions.
        beta: Weight of the divergence, or a schedule; the authors use 0.05 in their README and 0.1 in their scripts.

    Raises:
        ValueError: The reference is a cache.
    """

    citation: ClassVar[str] = "Anchored Supervised Fine-Tuning, arXiv 2509.23753"
    cost: ClassVar[str] = (
        "a forward of the reference, one of the LM head, and with reference=start a copy of the weights"
    )
    unsupported: ClassVar[dict[str, str]] = {
        "fsdp2": "It projects with the LM head itself, of which a rank has a shard; psft, which also keeps near the "
        "start, runs under FSDP2"
    }
    trainers = ("sft",)
    alone = "it reads the hidden states of the model's own forward, which a second objective may run again"

    reference: str = "start"
    beta: Annotated[Scheduled, Range(ge=0)] = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self._reference, LiveReference):
            raise ValueError(
                f"reference={self.reference!r} holds log-probabilities of labels only, and the divergence is "
                "over the whole vocabulary; use reference='start', 'base' or 'model:PATH'"
            )
        self._divergence = ReferenceDivergence(self._reference, "asft")

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T) in nats, at least 0 (arXiv 2509.23753).

        The core's denominator, for both terms, is all label tokens of the window.
        """
        return self._divergence.added_to_nll(tokens, tokens.probs.detach(), self.now("beta", tokens))

    @hookimpl
    def check(self, run: RunDescription) -> None:
        """Refuse what splits the LM head."""
        self._divergence.check(run)
        super().check(run)

    @hookimpl
    def setup(self, context: SetupContext) -> None:
        """Take the reference, and listen to both backbones."""
        super().setup(context)
        self._divergence.setup(context)

    def draw(self, path: str | PathLike[str]) -> None:
        """Draw DFT: the divergence is no function of p."""
        DFT().draw(path)
