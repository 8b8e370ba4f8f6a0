"""The moments of a step that transformers offers only to callbacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from trl_ext.engine.rank_comparison import compare_ranks
from trl_ext.gradients import trainable_parameters

if TYPE_CHECKING:
    from trl_ext.trainers.mixin import TrainerMixin


class StepCallback(TrainerCallback):
    """Runs `weights_updated` after the optimiser, and compares ranks every `rank_check_steps`."""

    def __init__(self, trainer: TrainerMixin) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if not trainer.ext_plugins.implements("weights_updated"):
            return
        skipped = trainer.ext_skipped or trainer.accelerator.optimizer_step_was_skipped
        trainer.ext_guard.run_all(
            "weights_updated", weights=trainer.ext_weights, step=state.global_step + 1, skipped=skipped
        )
        trainer.ext_guard.agree()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, every = self.trainer, args.rank_check_steps
        if every and trainer.accelerator.num_processes > 1 and state.global_step % every == 0:
            named = trainable_parameters(trainer.model)
            compare_ranks(named, trainer.ext_plugins, trainer.accelerator.device, state.global_step)
