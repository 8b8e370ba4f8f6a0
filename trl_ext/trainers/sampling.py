"""What GRPO, RLOO and distillation share: the order of the prompts, the weights to sample with, kept completions."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch

from trl_ext.checkpoints import State
from trl_ext.engine import rollouts
from trl_ext.engine.prompt_order import PromptOrder, PromptSampler, as_trl_draws
from trl_ext.startup.plan import RunPlan
from trl_ext.trainers.construction import TrainerMixin

logger = logging.getLogger(__name__)


class SamplingMixin(TrainerMixin):
    """Opens a trainer that draws completions from the model; checkpoints keep those still to be trained on."""

    _step: int
    _buffered_inputs: list[dict[str, Any]] | None

    def _ext_open(self, plan: RunPlan) -> None:
        super()._ext_open(plan)
        self.ext_order = PromptOrder(self.ext_run.guard)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(dataset)
        if not self.ext_plugins:
            return sampler
        if not self.ext_plugins.implements("prompt_order"):
            return PromptSampler(sampler, as_trl_draws)
        self.ext_order.chosen = None  # a second `train()` begins with epoch 0 again
        rows = self.train_dataset if dataset is None else dataset
        return PromptSampler(sampler, partial(self.ext_order.choose, rows))

    def _generate(self, prompts: Any) -> Any:
        with self.ext_swaps.to_sample():
            return super()._generate(prompts)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def ext_rank_state(self) -> State:
        """The rollouts still to be trained on with their schedule, and the order of prompts too."""
        state = super().ext_rank_state() | {"grpo_step": self._step, "grpo_schedule": self._ext_schedule()}
        state |= rollouts.pack(self._buffered_inputs)
        if self.ext_order.chosen is not None:
            epoch, order = self.ext_order.chosen
            state |= {"prompt_epoch": epoch, "prompt_order": torch.tensor(order)}
        return state

    def ext_load_rank_state(self, rank_state: State) -> None:
        super().ext_load_rank_state(rank_state)
        if "prompt_order" in rank_state and not self.args.reset_plugin_state:
            self.ext_order.chosen = rank_state["prompt_epoch"], rank_state["prompt_order"].tolist()
        changed = rollouts.changed_schedule(rank_state["grpo_schedule"], self._ext_schedule())
        if changed:
            # As TRL resumes: rollouts of the prompts that its sampler is at, and from there a whole round of them.
            self._step, self._buffered_inputs = 0, None
            logger.warning("The rollouts of the checkpoint are dropped and new ones drawn: %s", changed)
        else:
            self._step = rank_state["grpo_step"]
            self._buffered_inputs = rollouts.unpack(rank_state, self._prepare_input)

    def _ext_schedule(self) -> dict[str, Any]:
        """What decides how rollouts are cut into micro-batches, how often they are used, and what is kept of them."""
        args = self.args
        return {
            "per_device_train_batch_size": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "world_size": self.accelerator.num_processes,
            "use_vllm": args.use_vllm,
        }
