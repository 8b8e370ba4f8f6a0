"""The hook points of trl_ext, each declared once: its kind and moment, then its signature and what it is for.

Records are in `trl_ext.records`, the prose is in docs/hooks.md. The hooks stand in the order in which they first fire.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import pluggy

from trl_ext.records import TRAINERS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    import datasets
    import torch

    from trl_ext.gradients import GradientView
    from trl_ext.records import (
        AuxiliaryLoss,
        MicroStep,
        PolicyTokens,
        Rewards,
        Rollouts,
        RunDescription,
        SampleWeights,
        SetupContext,
        StreamGradient,
        StreamRequest,
        TokenRecord,
        WeightsView,
        Window,
    )

API_VERSION = "1.5"
PROJECT = "trl_ext"

Kind = Literal["all", "collect", "exclusive", "chain", "sum", "in place"]
"""What becomes of the results of several plugins. *all*: every plugin runs, and results are ignored. *collect*: results
are gathered. *exclusive*: at most one plugin of a run may implement the hook. *chain*: plugins run in the order of the
config, each on the result of the one before. *sum*: results are added up. *in place*: plugins run in the order of the
config, each edits its argument, and a returned value is an error."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class HookFacts:
    """What the core and the documents know of a hook beside its signature."""

    kind: Kind
    moment: str
    """When it fires, as docs/hooks.md says it."""
    trainers: tuple[str, ...]
    """The trainers that call it."""
    touches_update: bool
    """Whether its result enters the gradient, so that it may be the cause of a NaN."""
    bystander: bool
    """Whether it does nothing for the training by itself: a plugin needs another hook to be of use."""


HOOKS: dict[str, HookFacts] = {}
"""All hooks by name, in the order in which they first fire."""


def hook(
    kind: Kind,
    *,
    moment: str,
    trainers: tuple[str, ...] = TRAINERS,
    touches_update: bool = False,
    bystander: bool = False,
) -> Callable[[_Function], _Function]:
    """Declare a method of `HookSpecs` as a hook; the arguments are the fields of `HookFacts`."""

    def declare(specification: _Function) -> _Function:
        HOOKS[specification.__name__] = HookFacts(kind, moment, trainers, touches_update, bystander)
        return hookspec(specification)

    return declare


class HookSpecs:
    """Version 1 of the hook contract. A hook may be implemented with any subset of the arguments below."""

    @hook("all", moment="at construction, before the model loads", bystander=True)
    def check(self, run: RunDescription) -> None:
        """Raise, before the model loads, with the reason why this run cannot work."""

    @hook("collect", moment="at construction, before the model loads")
    def streams(self) -> list[StreamRequest]:
        """Name the auxiliary data sets that are wanted, at construction."""

    @hook("chain", moment="at the start of training")
    def wrap_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Give the optimiser to use in place of the one that TRL's arguments chose."""

    @hook("all", moment="at the start of training", bystander=True)
    def setup(self, context: SetupContext) -> None:
        """Take what is needed of the wrapped and prepared model, before the first step."""

    @hook("chain", moment="at the start of an epoch", trainers=("grpo",))
    def prompt_order(self, order: list[int], prompts: datasets.Dataset, epoch: int) -> list[int]:
        """Give the rows of the training set in the order to draw them in this epoch."""

    @hook("exclusive", moment="around the generation of training completions", trainers=("grpo",))
    def sampling_weights(self, weights: WeightsView) -> AbstractContextManager[None] | None:
        """Give a context inside which the weights are those to sample training completions with."""

    @hook("chain", moment="after the completions are rewarded", trainers=("grpo",), touches_update=True)
    def advantages(self, rollouts: Rollouts, rewards: Rewards, advantages: torch.Tensor) -> torch.Tensor:
        """Give the advantages (B,) or (B, T) of this rank's completions, in training and evaluation."""

    @hook(
        "exclusive",
        moment='in the first micro-step of a window, after its "before" streams',
        trainers=("sft",),
        touches_update=True,
    )
    def sample_weights(self, window: Window) -> torch.Tensor | SampleWeights | None:
        """Weigh the samples of an accumulation window, at its first training step."""

    @hook("exclusive", moment="in every micro-step, before its backward pass", touches_update=True)
    def per_token_loss(self, tokens: TokenRecord) -> torch.Tensor:
        """Give the loss (B, T) of each label token of an SFT batch or of an SFT stream."""

    @hook("exclusive", moment="in every micro-step, before its backward pass", trainers=("grpo",), touches_update=True)
    def policy_loss(self, tokens: PolicyTokens) -> torch.Tensor:
        """Give the policy term (B, T) in place of the clipped one, before masks and reduction."""

    @hook("sum", moment="in every micro-step, before its backward pass", touches_update=True)
    def auxiliary_losses(self, micro_step: MicroStep) -> Mapping[str, AuxiliaryLoss]:
        """Add named terms to the loss of every training micro-step."""

    @hook(
        "in place",
        moment='in the last micro-step of a window, after its "after" streams and before clipping',
        touches_update=True,
    )
    def gradients_ready(self, gradients: GradientView, streams: Mapping[str, StreamGradient]) -> None:
        """Read or edit the window's reduced gradients in place, before clipping."""

    @hook("all", moment="after the optimiser's step")
    def weights_updated(self, weights: WeightsView, step: int, skipped: bool) -> None:
        """See the weights right after the optimiser's step number `step` (from 1), skipped or not."""

    @hook("collect", moment="at each log", bystander=True)
    def metrics(self, mode: str) -> Mapping[str, float]:
        """Give numbers to log under the plugin's name, on every rank; `mode` is "train" or "eval"."""

    @hook("exclusive", moment="around evaluation, prediction and the final save")
    def deployed_weights(
        self, weights: WeightsView
    ) -> AbstractContextManager[None] | Mapping[str, AbstractContextManager[None]]:
        """Give a context inside which the weights are those to evaluate and to save at the end."""
