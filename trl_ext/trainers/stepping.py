"""The overrides around training steps and the log; what they do is in `trl_ext.engine.step`."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from trl_ext.engine.step import OptimizerStep
from trl_ext.trainers.base import Opened


class SteppingMixin(Opened):
    """Wraps the training step, the gradient norm and the log."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        samples, num_items = super().get_batch_samples(*args, **kwargs)
        self.ext_step.take_window(samples, num_items)
        return samples, num_items

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        return self.ext_step.micro_step(model, partial(super().training_step, model, inputs, num_items_in_batch))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.ext_step.agree(model, norm)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.ext_plugins or self.ext_step.nonfinite != "ignore":
            mode = "train" if self.model.training else "eval"
            gather = self.ext_run.guard.gather if self.ext_plugins.implements("auxiliary_losses") else None
            self.ext_run.tally.write(logs, mode, self.accelerator, nll=bool(self.ext_plugins), gather=gather)
            name = f"{self.ext_metric_name}_" if self.ext_metric_name else ""
            if name:  # TRL puts "eval_" in front of its own metrics, whatever is evaluated
                self._metrics[mode] = defaultdict(list, {name + k: v for k, v in self._metrics[mode].items()})
            if "train_runtime" not in logs:  # not the summary at the end, which belongs to no step
                prefix = "" if mode == "train" else f"eval_{name}"
                numbers = self.ext_run.guard.collect("metrics", mode=mode)
                logs.update({prefix + k: v for k, v in numbers.items()})
        super().log(logs, start_time)


class StepCallback(TrainerCallback):
    """The moments of a step that transformers offers only to callbacks."""

    def __init__(self, step: OptimizerStep, accelerator: Any) -> None:
        self.step = step
        self.accelerator = accelerator

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step.weights_updated(self.accelerator.optimizer_step_was_skipped)
        if self.step.out_of_data:
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step.end()
