"""The overrides around training steps and the log; what they do is in `trl_ext.engine.step`."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from trl_ext.engine.step import OptimizerStep
from trl_ext.errors import ConfigurationError
from trl_ext.trainers.base import Opened


class SteppingMixin(Opened):
    """Wraps the training step, the gradient norm and the log."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        samples, num_items = super().get_batch_samples(*args, **kwargs)
        self.ext_step.take_window(samples, num_items)
        return samples, num_items

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self.ext_reached -= {"compute_loss", "_compute_loss"}
        loss = self.ext_step.micro_step(model, partial(super().training_step, model, inputs, num_items_in_batch))
        self._ext_refuse_bypassed()
        return loss

    def _ext_refuse_bypassed(self) -> None:
        """Refuse that a user's subclass replaces a method of TRL in which a hook of an active plugin is called.

        Which methods a class replaces is the same on all ranks.

        Raises:
            ConfigurationError: with the method to call.
        """
        for hook, method in self.ext_called_from.items():
            if method not in self.ext_reached and self.ext_plugins.implements(hook):
                plugin, _ = self.ext_plugins.calls(hook)[0]
                raise ConfigurationError(
                    f"{type(self).__name__} does without TRL's {method}, in which '{hook}' of plugin '{plugin}' is "
                    f"called; call super().{method}(...) there and go on from its result, or remove the plugin"
                )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.is_deepspeed_enabled:  # it has stepped already, and the ranks have agreed before
            return norm
        # Infinite gradients are the scaler's own business under fp16: it leaves the step out and takes a smaller scale.
        self.ext_step.agree(model, norm if self.accelerator.scaler is None else 0.0)
        return norm

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self.ext_step.end_training()
        return super()._finalize_training(*args, **kwargs)

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
