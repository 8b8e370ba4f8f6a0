"""`SFTTrainer`: TRL's, with the objective, the sample weights and auxiliary losses open to plugins."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import trl
from torch import Tensor, nn

from trl_ext.config import SFTConfig
from trl_ext.engine.fused_head import add_head
from trl_ext.engine.sample_weights import SampleWeighting
from trl_ext.engine.sft_loss import SFTLoss
from trl_ext.records.columns import CARRIED
from trl_ext.startup.carriage import collator_with_columns, prepare_with_columns
from trl_ext.startup.plan import RunPlan
from trl_ext.trainers.construction import TrainerMixin


class SFTTrainer(TrainerMixin, trl.SFTTrainer):
    """Drop-in for `trl.SFTTrainer` with the hook points of `trl_ext.hookspecs`.

    The objective works on the per-token log-probabilities of TRL's fused LM head: no logits are built and there is no
    second forward. Give it as for TRL, and in addition:

    Args:
        plugins: instances to activate after those that `args.plugins` names.
        streams: role to auxiliary data set, in addition to those that `args.streams` names.
    """

    ext_kind = "sft"
    ext_config_class = SFTConfig
    ext_called_from = dict.fromkeys(("per_token_loss", "sample_weights", "auxiliary_losses"), "compute_loss")

    data_collator: Any

    def _ext_open(self, plan: RunPlan) -> None:
        super()._ext_open(plan)
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        self.ext_step.weighting = SampleWeighting(self.ext_run, self.ext_passes, self._prepare_inputs, ranks)
        self.ext_loss = SFTLoss(self.ext_run, self.ext_step.window, ranks)
        if plan.fused_outputs:
            add_head(self.ext_base_model(), ("log_probs", "entropy", "is_top1", *plan.fused_outputs))
        if plan.columns.data:
            self.data_collator = collator_with_columns(self.data_collator, plan.columns.data)

    def _ext_sft_head(self) -> Callable[[], AbstractContextManager[None]]:
        return nullcontext  # its own head does

    def _ext_samples_marked(self) -> bool:
        args = self.args
        packing = args.packing if self.model.training or args.eval_packing is None else args.eval_packing
        return not (packing and args.packing_strategy == "wrapped")

    # -- columns of the data -----------------------------------------------------------------------------------------

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        prepare = super()._prepare_dataset
        if not self.ext_columns.data:
            return prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)

        def as_trl_does(dataset: Any, args: Any, packing: bool) -> Any:
            return prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)

        known = {"train": "the training data", "eval": "the evaluation data"}
        what = known.get(dataset_name, f"the evaluation data {dataset_name!r}")
        return prepare_with_columns(as_trl_does, dataset, args, packing, self.ext_columns.data, what)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.ext_columns.data and CARRIED not in self._signature_columns:
            self._signature_columns.append(CARRIED)

    # -- loss --------------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if not self.ext_plugins:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.model.training:
            self.ext_reached.add("compute_loss")
        return self.ext_loss.loss(super().compute_loss, model, inputs, return_outputs, num_items_in_batch)


__all__ = ["SFTTrainer"]
