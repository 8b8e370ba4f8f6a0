"""Sums behind the logged numbers, kept on the device and reduced once a log: no synchronisation in the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


class LossTally:
    """Counts what TRL does not log: NLL whatever the objective, streams' NLL, and the loss over finite steps only.

    Args:
        device: where the sums live.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._nll = {"train": self._zeros(), "eval": self._zeros()}
        self._streams: dict[str, list[float]] = {}
        self._terms: dict[str, Tensor] = {}
        self._steps_since_log = 0
        self._step_loss: Tensor | None = None
        self._since_log = self._zeros()
        self._in_run = self._zeros()
        self._skipped_since_log = 0
        self._skipped_in_run = 0

    def _zeros(self) -> Tensor:
        return torch.zeros(2, device=self._device)

    def add_tokens(self, mode: str, log_probs: Tensor, mask: Tensor) -> None:
        """Add a micro-batch's NLL.

        Args:
            mode: "train" or "eval".
            log_probs: (B, T), 0 without a label.
            mask: (B, T) bool.
        """
        self._nll[mode] += torch.stack([-log_probs.detach().float().sum(), mask.sum()])

    def add_stream(self, role: str, nll: float) -> None:
        """Add a stream batch's mean NLL per token, already reduced over ranks."""
        self._streams.setdefault(role, []).append(nll)

    def add_term(self, name: str, value: Tensor) -> None:
        """Add a micro-step's share of an auxiliary loss, scaled as for the backward pass."""
        self._terms[name] = self._terms.get(name, torch.zeros((), device=self._device)) + value.detach().float()

    def add_step_loss(self, loss: Tensor) -> None:
        """Add a micro-step's loss, scaled as for the backward pass; for runs that may leave a step out."""
        self._step_loss = loss.detach() if self._step_loss is None else self._step_loss + loss.detach()

    def end_step(self, skipped: bool) -> None:
        """Close an optimiser step; a skipped one does not count in the logged loss."""
        self._steps_since_log += 1
        if skipped:
            self._skipped_since_log += 1
            self._skipped_in_run += 1
        elif self._step_loss is not None:
            one_step = torch.stack([self._step_loss, torch.ones_like(self._step_loss)])
            self._since_log += one_step
            self._in_run += one_step
        self._step_loss = None

    def write(
        self,
        logs: dict[str, float],
        mode: str,
        accelerator: Accelerator,
        *,
        nll: bool,
        gather: Callable[[list[str]], list[list[str]]] | None = None,
    ) -> None:
        """Put the numbers into TRL's logs and start the next interval. Collective.

        Args:
            logs: what is about to be logged; its loss is corrected where steps were skipped.
            mode: "train" or "eval".
            accelerator: sums over ranks.
            nll: whether to add the NLL, which plain TRL does not log.
            gather: gives every rank's object, on every rank; wanted where there may be auxiliary losses, since a rank
                may have had no term under a name. It counts as zero there, as it does in the gradient.
        """

        def reduce(tensor: Tensor) -> Tensor:
            return accelerator.reduce(tensor, reduction="sum")

        if nll:
            total, tokens = reduce(self._nll[mode]).tolist()
            if tokens:
                loss_keys = [key for key in logs if key.endswith("_loss") and key != "train_loss"]
                prefix = loss_keys[0].removesuffix("loss") if mode == "eval" and loss_keys else ""
                logs[f"{prefix}nll"] = total / tokens
            self._nll[mode].zero_()
        if mode == "eval":
            return
        logs.update({f"{role}_stream/nll": sum(values) / len(values) for role, values in self._streams.items()})
        self._streams.clear()
        names = [list(self._terms)] if gather is None else gather(list(self._terms))
        for name in sorted({name for of_rank in names for name in of_rank}):
            term = self._terms.get(name, torch.zeros((), device=self._device))
            logs[name] = (reduce(term) / (accelerator.num_processes * self._steps_since_log)).item()
        self._terms.clear()
        self._steps_since_log = 0
        if self._skipped_since_log:
            logs["skipped_steps"] = float(self._skipped_since_log)
        for key, sums, skipped in (
            ("loss", self._since_log, self._skipped_since_log),
            ("train_loss", self._in_run, self._skipped_in_run),
        ):
            if key in logs and skipped:
                # transformers puts an average in place of a NaN loss, which is 0.0 for the first: say NaN instead.
                total, steps = reduce(sums).tolist()
                logs[key] = total / steps if steps else math.nan
        if "loss" in logs:
            self._since_log.zero_()
            self._skipped_since_log = 0
