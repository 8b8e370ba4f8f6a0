"""The hook points of trl_ext: one hook, one sentence. Records are in `trl_ext.records`, the prose in docs/hooks.md.

Kinds. *all*: every plugin runs, results are ignored. *collect*: results are gathered. *exclusive*: at most one plugin
may implement the hook, checked at start-up. *chain*: plugins run in the order of the config, each on the result of the
one before; returning None is an error. *sum*: results are added up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

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

API_VERSION = "1.2"
PROJECT = "trl_ext"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class HookSpecs:
    """Version 1 of the hook contract. A hook may be implemented with any subset of the arguments below."""

    @hookspec
    def check(self, run: RunDescription) -> None:
        """[all] Raise, before the model loads, with the reason why this run cannot work."""

    @hookspec
    def setup(self, context: SetupContext) -> None:
        """[all] Take what is needed of the wrapped and prepared model, before the first step."""

    @hookspec
    def streams(self) -> list[StreamRequest]:
        """[collect] Name the auxiliary data sets that are wanted, at construction."""

    @hookspec
    def prompt_order(self, order: list[int], prompts: datasets.Dataset, epoch: int) -> list[int]:
        """[chain, GRPO] Give the rows of the training set in the order to draw them in this epoch."""

    @hookspec
    def sampling_weights(self, weights: WeightsView) -> AbstractContextManager[None] | None:
        """[exclusive, GRPO] Give a context inside which the weights are those to sample training completions with."""

    @hookspec
    def sample_weights(self, window: Window) -> torch.Tensor | SampleWeights | None:
        """[exclusive, SFT] Weigh the samples of an accumulation window, at its first training step."""

    @hookspec
    def per_token_loss(self, tokens: TokenRecord) -> torch.Tensor:
        """[exclusive] Give the loss (B, T) of each label token of an SFT batch or of an SFT stream."""

    @hookspec
    def advantages(self, rollouts: Rollouts, rewards: Rewards, advantages: torch.Tensor) -> torch.Tensor:
        """[chain, GRPO] Give the advantages (B,) or (B, T) of this rank's completions, in training and evaluation."""

    @hookspec
    def policy_loss(self, tokens: PolicyTokens) -> torch.Tensor:
        """[exclusive, GRPO] Give the policy term (B, T) in place of the clipped one, before masks and reduction."""

    @hookspec
    def auxiliary_losses(self, micro_step: MicroStep) -> Mapping[str, AuxiliaryLoss]:
        """[sum] Add named terms to the loss of every training micro-step."""

    @hookspec
    def gradients_ready(self, gradients: GradientView, streams: Mapping[str, StreamGradient]) -> None:
        """[chain] Read or edit the window's reduced gradients in place, before clipping."""

    @hookspec
    def wrap_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """[chain] Give the optimiser to use in place of the one that TRL's arguments chose."""

    @hookspec
    def weights_updated(self, weights: WeightsView, step: int, skipped: bool) -> None:
        """[all] See the weights right after the optimiser's step number `step` (from 1), skipped or not."""

    @hookspec
    def deployed_weights(
        self, weights: WeightsView
    ) -> AbstractContextManager[None] | Mapping[str, AbstractContextManager[None]]:
        """[exclusive] Give a context inside which the weights are those to evaluate and to save at the end."""

    @hookspec
    def metrics(self, mode: str) -> Mapping[str, float]:
        """[collect] Give numbers to log under the plugin's name, on every rank; `mode` is "train" or "eval"."""


HOOKS: tuple[str, ...] = tuple(name for name, value in vars(HookSpecs).items() if callable(value) and name[0] != "_")
EXCLUSIVE: frozenset[str] = frozenset(
    {"sampling_weights", "sample_weights", "per_token_loss", "policy_loss", "deployed_weights"}
)
SFT_ONLY: frozenset[str] = frozenset({"sample_weights"})
GRPO_ONLY: frozenset[str] = frozenset({"prompt_order", "sampling_weights", "advantages", "policy_loss"})
FOREIGN: dict[str, frozenset[str]] = {"sft": GRPO_ONLY, "grpo": SFT_ONLY}
"""The hooks that a trainer never calls."""
GRADIENT_HOOKS: frozenset[str] = frozenset({"sample_weights", "gradients_ready"})
