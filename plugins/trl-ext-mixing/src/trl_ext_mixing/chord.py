"""CHORD: GRPO's and SFT's losses in one weighted sum whose weight moves from imitation to reinforcement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from trl_ext import hookimpl
from trl_ext.gradients import GradientView
from trl_ext.records import StreamGradient, TokenRecord
from trl_ext_mixing.comparison import Comparison
from trl_ext_mixing.schedule import scheduled
from trl_ext_mixing.two_gradients import TwoGradients


@hookimpl
def phi_loss(tokens: TokenRecord) -> Tensor:
    """(B, T): sg[p (1 - p)] (-log p): tokens that are neither known nor hopeless (arXiv:2508.11408, CHORD-phi)."""
    p = tokens.log_probs.detach().exp()
    return -p * (1 - p) * tokens.log_probs


@dataclass(eq=False, kw_only=True)
class Chord(TwoGradients):
    """Loss (1 - mu) L_GRPO + mu L_SFT under one optimiser; each loss has its own denominator.

    Args:
        mu: weight of the SFT loss at the start, in [0, 1].
        mu_end: weight when the decay is over; `mu` throughout where None.
        decay: share of the run in (0, 1] over which mu moves; it stays at `mu_end` afterwards.
        schedule: "linear" or "cosine".
        phi: weigh SFT tokens by sg[p (1 - p)]; then no objective plugin can be active.
    """

    mu: float = 0.9
    mu_end: float | None = 0.05
    decay: float = 1.0
    schedule: Literal["linear", "cosine"] = "linear"
    phi: bool = False

    method: ClassVar[str] = "chord"
    citation: ClassVar[str] = "Zhang et al., On-Policy RL Meets Off-Policy Experts (CHORD), arXiv:2508.11408"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mu", "mu_end"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"chord: {name}={value} is not in [0, 1]")
        if not 0 < self.decay <= 1:
            raise ValueError(f"chord: decay={self.decay} is not in (0, 1]")
        if self.schedule not in ("linear", "cosine"):
            raise ValueError(f"chord: schedule={self.schedule!r} is not one of linear, cosine")
        if self.phi and self.demonstrations:
            raise ValueError(
                f"chord: phi weighs the tokens of a stream, and demonstrations={self.demonstrations!r} uses none; give "
                "the demonstrations as the stream 'sft' and their rows by stream_row"
            )
        if self.phi:
            self.per_token_loss = phi_loss  # an exclusive hook: claimed only where it is wanted

    def mix(self, gradients: GradientView, sft: StreamGradient, both: Comparison) -> None:
        mu = scheduled(self.mu, self.mu_end, self.progress / self.decay, self.schedule)
        self.note(mu=mu)
        gradients.mul_(1 - mu).axpy_(mu, sft.gradients)
