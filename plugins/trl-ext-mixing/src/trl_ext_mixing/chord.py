"""CHORD (arXiv:2508.11408): one optimiser on both losses, and a weight mu that moves from imitation to reinforcement.

    L = (1 - mu_t) L_GRPO + mu_t L_SFT

    mu_t = mu * t / w                                       t < w            warm-up over w steps
           mu_end + (mu - mu_end) (1 + cos(pi (t - w) / d)) / 2    t - w <= d       decay over d steps
           mu_end                                           afterwards

CHORD-phi weighs each token of L_SFT by sg[p (1 - p)]: the objective `chord-phi` of trl-ext-objectives beside this
plugin, `plugins: [chord, chord-phi]`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from trl_ext import hookimpl
from trl_ext.gradients import GradientView
from trl_ext.options import Range
from trl_ext.records import SetupContext, StreamGradient
from trl_ext.schedules import Schedule
from trl_ext_mixing.comparison import Comparison
from trl_ext_mixing.two_gradients import TwoGradients

logger = logging.getLogger(__name__)


@dataclass(eq=False, kw_only=True)
class Chord(TwoGradients):
    """Loss (1 - mu) L_GRPO + mu L_SFT under one optimiser; each loss has its own denominator.

    The defaults are those of CHORD-mu in the paper and in the authors' code (Trinity-RFT, `mix_chord`): no warm-up, and
    mu from 0.9 to 0.05 along a cosine in the first 200 steps. CHORD-phi there keeps mu at 0.1 and weighs tokens:
    `plugins: [{name: chord, mu: 0.1, mu_end: 0.1}, chord-phi]`, with chord-phi from trl-ext-objectives, which acts on
    the stream "sft" (not on `demonstrations=`, which are scored by plain log-likelihood). Different from theirs: they
    average L_SFT over micro-batches, and here it is one mean over all label tokens of the step.

    Args:
        mu: weight of the SFT loss at its highest, in [0, 1].
        mu_end: weight when the decay is over; `mu` throughout where None.
        warmup: steps in which mu rises from 0; up to 1, a share of the run.
        decay: steps in which mu moves to `mu_end`, where it stays; up to 1, a share of the run (1 for the whole run).
        schedule: the shape of the decay, "linear" or "cosine".
    """

    mu: Annotated[float, Range(ge=0, le=1)] = 0.9
    mu_end: Annotated[float, Range(ge=0, le=1)] | None = 0.05
    warmup: Annotated[float, Range(ge=0)] = 0.0
    decay: Annotated[float, Range(gt=0)] = 200.0
    schedule: Literal["linear", "cosine"] = "cosine"

    method: ClassVar[str] = "chord"
    citation: ClassVar[str] = "Zhang et al., On-Policy RL Meets Off-Policy Experts (CHORD), arXiv:2508.11408"

    def mix(self, gradients: GradientView, sft: StreamGradient, both: Comparison) -> None:
        """g <- (1 - mu_t) g_RL + mu_t g_SFT."""
        mu = self.mu_at(self.step)
        self.note(mu=mu)
        gradients.mul_(1 - mu).axpy_(mu, sft.gradients)

    def mu_at(self, step: int) -> float:
        """mu after `step` optimiser steps."""
        warmup, decay = self._in_steps(self.warmup), self._in_steps(self.decay)
        if step < warmup:
            return self.mu * step / warmup
        end = self.mu if self.mu_end is None else self.mu_end
        return Schedule(self.schedule, self.mu, end)((step - warmup) / decay)

    def _in_steps(self, length: float) -> float:
        return length * self.max_steps if length <= 1 else length

    @hookimpl
    def setup(self, context: SetupContext) -> None:
        super().setup(context)
        decayed = self._in_steps(self.warmup) + self._in_steps(self.decay)
        if self.mu_end not in (None, self.mu) and decayed > self.max_steps:
            logger.warning(
                "chord: mu reaches mu_end=%g after %g steps, but the run has %d steps and ends at mu=%.3g; decay=1 "
                "makes the decay as long as the run",
                self.mu_end,
                decayed,
                self.max_steps,
                self.mu_at(self.max_steps),
            )
