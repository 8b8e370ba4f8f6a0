"""One optimiser step: streams and gradient hooks around TRL's micro-steps, and the agreement before the optimiser."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trl_ext.engine.streams import stream_gradient
from trl_ext.gradients import GradientView
from trl_ext.records import StreamGradient, TokenRecord
from trl_ext.trainers.base import Opened


class StepMixin(Opened):
    """Wraps the training step, the gradient norm and the log."""

    ext_micro_step: int = 0
    """Micro-steps of this window already done."""
    ext_window: list[Any]
    """The window's micro-batches, as the loader gave them."""
    ext_num_items: Tensor | int | None
    """Label tokens of the window over all ranks, as transformers counts them."""
    _ext_before: dict[str, StreamGradient]
    _ext_finite: Tensor

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        samples, num_items = super().get_batch_samples(*args, **kwargs)
        # Only noted: on resume this runs before the random state is restored.
        self.ext_window, self.ext_num_items, self.ext_micro_step = samples, num_items, 0
        return samples, num_items

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if self.ext_plugins and self.ext_micro_step == 0:
            model.train()  # as TRL is about to; after an evaluation it is not yet
            self.ext_begin_window(model)
            kept = {role for role, stream in self.ext_streams.items() if stream.request.keep}
            self._ext_before = {role: g for role, g in self._ext_before.items() if role in kept}
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.ext_plugins and self.accelerator.sync_gradients:
            self.ext_end_window(model)
        if self.ext_nonfinite != "ignore":
            finite = torch.isfinite(loss)
            self._ext_finite = finite if self.ext_micro_step == 0 else self._ext_finite & finite
        if self.ext_nonfinite == "skip":
            self.ext_tally.add_step_loss(loss)
        self.ext_micro_step += 1
        return loss

    def ext_begin_window(self, model: nn.Module) -> None:
        """Before the window's first forward."""
        self._ext_before = self._ext_stream_gradients(model, "before")

    def ext_end_window(self, model: nn.Module) -> None:
        """After the window's last backward: gradients are reduced and not clipped yet."""
        streams = {**self._ext_before, **self._ext_stream_gradients(model, "after")}
        self._ext_before = {}
        if self.ext_plugins.implements("gradients_ready"):
            view = GradientView(self.ext_weights.names, self.ext_weights.parameters, agree=self.ext_guard.agree)
            self.ext_guard.run_all("gradients_ready", gradients=view, streams=streams)
            if self.ext_weights.sharded:
                self.ext_guard.agree()
        if any(stream.exhausted and stream.request.on_exhausted == "stop" for stream in self.ext_streams.values()):
            self.control.should_training_stop = True

    def _ext_stream_gradients(self, model: nn.Module, when: str) -> dict[str, StreamGradient]:
        gradients = {}
        for role, stream in self.ext_streams.items():
            if stream.request.when == when:
                gradients[role] = stream_gradient(self, model, stream)
                self.ext_tally.add_stream(role, gradients[role].nll)
        return gradients

    def ext_per_token_loss(self, record: TokenRecord) -> Tensor:
        """(B, T) the objective's loss, 0 without a label: the owner's, or the negative log-probability."""
        nll = -record.log_probs
        if not self.ext_plugins.implements("per_token_loss"):
            return nll
        loss = self.ext_guard.exclusive("per_token_loss", nll, check=same_shape(nll), tokens=record)
        # `where`, not a product: a loss may be infinite at masked positions, where the log-probability reads 0.
        return torch.where(record.mask, loss, torch.zeros_like(loss))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """After clipping, right before the optimiser: all ranks agree on failures and on finiteness."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.ext_nonfinite == "ignore":
            if self.ext_plugins:
                self.ext_guard.agree()
            return norm
        value = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.ext_skipped = not self.ext_guard.agree_finite(value, self._ext_finite)
        if self.ext_skipped:
            if self.ext_nonfinite == "raise":
                raise self.ext_guard.non_finite()
            for parameter in model.parameters():
                parameter.grad = None  # optimisers leave parameters without a gradient, and their moments, alone
        self.ext_tally.end_step(self.ext_skipped)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.ext_plugins or self.ext_nonfinite != "ignore":
            mode = "train" if self.model.training else "eval"
            self.ext_tally.write(logs, mode, self.accelerator, nll=bool(self.ext_plugins))
            name = f"{self.ext_metric_name}_" if self.ext_metric_name else ""
            if name:  # TRL puts "eval_" in front of its own metrics, whatever is evaluated
                self._metrics[mode] = defaultdict(list, {name + k: v for k, v in self._metrics[mode].items()})
            if "train_runtime" not in logs:  # not the summary at the end, which belongs to no step
                prefix = "" if mode == "train" else f"eval_{name}"
                logs.update({prefix + k: v for k, v in self.ext_guard.collect("metrics", mode=mode).items()})
        super().log(logs, start_time)


def same_shape(log_probs: Tensor) -> Callable[[Any], None]:
    """A check that a loss hook has returned one number per token."""

    def check(loss: Any) -> None:
        if not isinstance(loss, Tensor) or loss.shape != log_probs.shape:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"returned {got}; expected a loss of shape {tuple(log_probs.shape)}")

    return check
