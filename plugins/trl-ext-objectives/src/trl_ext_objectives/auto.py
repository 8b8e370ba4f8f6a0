"""Auto: `1 - p` where the base model is strong on the training data, `-log p` elsewhere (arXiv 2510.00526).

Strong is a mean probability of the response tokens of at least 0.76, the weakest of the paper's strong settings.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from trl_ext_probing.capability.continuum import recommend
from trl_ext_probing.capability.positions import Capability

from trl_ext import hookimpl
from trl_ext_objectives.nll import NLL
from trl_ext_objectives.objective import Objective
from trl_ext_objectives.power import Power

if TYPE_CHECKING:
    from torch import Tensor

    from trl_ext.records import RunDescription, SetupContext, TokenRecord

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Auto(Objective):
    """-p where the base model is as strong as in the paper's strong settings, NLL elsewhere.

    The capability is read from `probe`, or measured as the training goes through its first window, before any update:
    each micro-batch there takes the choice that all ranks' tokens so far suggest, and the window's end settles it. That
    is a small sample; `trl-ext probe capability` measures the whole data set.

    Args:
        probe: Output folder of `trl-ext probe capability` for the base model on this data set, or nothing.
    """

    citation: ClassVar[str] = "Beyond Log Likelihood: Probability-Based Objectives for SFT, arXiv 2510.00526"
    trainers = ("sft",)
    state_version: ClassVar[int] = 1
    unsupported: ClassVar[dict[str, str]] = {
        "failure_on_one_rank": "In the first window two sums are reduced over ranks, with nothing but sums before it"
    }

    probe: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._forget()

    def _forget(self) -> None:
        self._sums: Tensor | None = None
        self._choice: Objective = NLL()
        self._mean_p = float("nan")
        self._settled = False

    @hookimpl
    def check(self, run: RunDescription) -> None:
        """Read the probe's file, before the model loads."""
        if self.probe:
            self._choose(Capability.load(self.probe, "auto: probe").mean_p.bounds[0])
            self._settled = True

    @hookimpl
    def setup(self, context: SetupContext) -> None:
        """Say what was chosen, or measure this training's model anew."""
        if not self.probe:
            self._forget()
        elif context.rank == 0:
            logger.warning("auto: %s", self._explain())

    @hookimpl
    def per_token_loss(self, tokens: TokenRecord) -> Tensor:
        """Loss (B, T), at least 0, of the objective that was chosen: 1 - p, or -log p in nats (arXiv 2510.00526).

        The core's denominator is all label tokens of the window.
        """
        if not self._settled and tokens.training and tokens.stream is None:
            if tokens.progress == 0:
                self._measure(tokens)
            else:
                self._settled = True
                logger.warning("auto: %s", self._explain())
        return self._choice.per_token_loss(tokens)

    @hookimpl
    def metrics(self, mode: str) -> dict[str, float]:
        """`mean_p` of the base model, and whether the prior-leaning objective is in use."""
        return {"mean_p": self._mean_p, "prior_leaning": float(isinstance(self._choice, Power))}

    def state_dict(self) -> dict[str, Any]:
        """The measurement, so that a resumed run keeps the choice."""
        return {"mean_p": self._mean_p}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        if not self.probe:
            self._choose(state["mean_p"])
            self._settled = True

    def _measure(self, tokens: TokenRecord) -> None:
        log_probs, mask = tokens.log_probs.detach(), tokens.mask
        sums = torch.stack([(log_probs.exp() * mask).sum(), mask.sum()])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)  # every rank takes this path alike: progress is the same on all
        self._sums = sums if self._sums is None else self._sums + sums
        if self._sums[1] > 0:
            self._choose(float(self._sums[0] / self._sums[1]))

    def _choose(self, mean_p: float) -> None:
        self._mean_p = mean_p
        self._choice = Power(1.0) if recommend(mean_p).objective == "power:alpha=1" else NLL()

    def _explain(self) -> str:
        advice = recommend(self._mean_p)
        return f"{advice.objective}, since {advice.reason}. {advice.limits}"
