"""What DPO and KTO share: auxiliary losses, and a reference that no plugin touches."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from trl_ext.engine.preference_loss import PreferenceLoss
from trl_ext.startup.plan import RunPlan
from trl_ext.trainers.construction import TrainerMixin


class PreferenceMixin(TrainerMixin):
    """Opens the auxiliary losses in a trainer whose reference stays what TRL makes it, also in evaluation.

    `deployed_weights` exchanges the parameters that are trained. Neither those of `ref_model` are among them, nor those
    that PEFT's model has with the adapter off or replaced by the adapter "ref".
    """

    ext_called_from = {"auxiliary_losses": "compute_loss"}

    def _ext_open(self, plan: RunPlan) -> None:
        super()._ext_open(plan)
        self.ext_loss = PreferenceLoss(self.ext_run, self.ext_step.window)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if self.model.training:
            self.ext_reached.add("compute_loss")
        return self.ext_loss.loss(super().compute_loss, model, inputs, return_outputs, num_items_in_batch)
