"""`GRPOTrainer`: TRL's, with the prompts, the advantages, the policy term and auxiliary losses open to plugins."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import trl
from torch import Tensor, nn
from trl.trainer.utils import RepeatSampler

from trl_ext.checkpoints import State
from trl_ext.config import GRPOConfig
from trl_ext.engine import rollouts
from trl_ext.engine.finite_rewards import nan_as_infinite, reward_fault, without_faults
from trl_ext.engine.grpo_loss import GRPOLoss
from trl_ext.engine.passes import sft_head
from trl_ext.engine.prompt_order import PromptOrder, PromptSampler, as_trl_has_it
from trl_ext.records import Rewards
from trl_ext.startup.plan import RunPlan
from trl_ext.trainers.construction import TrainerMixin

logger = logging.getLogger(__name__)


class GRPOTrainer(TrainerMixin, trl.GRPOTrainer):
    """Drop-in for `trl.GRPOTrainer` with the hook points of `trl_ext.hookspecs`. Give it as for TRL, and in addition:

    Args:
        plugins: instances to activate after those that `args.plugins` names.
        streams: role to auxiliary SFT data set, in addition to those that `args.streams` names.
    """

    ext_kind = "grpo"
    ext_config_class = GRPOConfig
    ext_called_from = {
        "policy_loss": "_compute_loss",
        "auxiliary_losses": "_compute_loss",
        "advantages": "_generate_and_score_completions",
    }

    reward_funcs: list[Any]
    _buffered_inputs: list[dict[str, Any]] | None
    _ext_scored: tuple[dict[str, Any], Rewards]
    """Rows and rewards of the generation batch at hand."""

    def _ext_open(self, plan: RunPlan) -> None:
        super()._ext_open(plan)
        self.ext_loss = GRPOLoss(
            self.ext_run,
            policy_term_alone=self._ext_policy_term_alone,
            metrics=lambda: self._metrics["train" if self.model.training else "eval"],
            gather=self.accelerator.gather,
            loss_type=self.loss_type,
            window=self.ext_step.window,
            window_batches=self._ext_window_batches,
        )
        self.ext_order = PromptOrder(self.ext_run.guard)
        if self.ext_step.nonfinite != "ignore":
            self.reward_funcs = [nan_as_infinite(function) for function in self.reward_funcs]

    def _ext_window_batches(self) -> list[dict[str, Any]] | None:
        assert self._buffered_inputs is not None, "generated before the window's first loss"
        done, accumulation = self.ext_step.window.done, self.current_gradient_accumulation_steps
        return rollouts.window_batches(self._buffered_inputs, self._step, done, accumulation, self.args.num_iterations)

    def _ext_sft_head(self) -> Callable[[], AbstractContextManager[None]]:
        outputs, cast = self.ext_run.fused_outputs, self.args.cast_lm_head_to_fp32
        return sft_head(self.ext_base_model, outputs, self.accelerator.autocast, cast)

    @contextmanager
    def _ext_policy_term_alone(self) -> Iterator[None]:
        off = {"beta": 0.0, "_entropy_bonus_enabled": False, "aux_loss_enabled": False}
        apart = {"_metrics": {mode: type(kept)(list) for mode, kept in self._metrics.items()}}
        saved = {name: getattr(self, name) for name in (*off, *apart)}
        self.__dict__.update(off | apart)
        try:
            yield
        finally:
            self.__dict__.update(saved)

    # -- prompts and completions -------------------------------------------------------------------------------------

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(dataset)
        if not self.ext_plugins or not isinstance(sampler, RepeatSampler):
            return sampler
        if not self.ext_plugins.implements("prompt_order"):
            return PromptSampler(sampler, as_trl_has_it)  # TRL's order, in a resumed run that of its epoch too
        self.ext_order.chosen = None  # a second `train()` begins with epoch 0 again
        rows = self.train_dataset if dataset is None else dataset
        return PromptSampler(sampler, partial(self.ext_order.choose, rows))

    def _generate(self, prompts: Any) -> Any:
        self.ext_reached.discard("_generate_and_score_completions")
        with self.ext_swaps.to_sample():
            return super()._generate(prompts)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        start = self.accelerator.process_index * len(prompts)
        self._ext_scored = (
            {"inputs": inputs, "prompts": prompts, "completions": completions},
            Rewards(rewards, tuple(self.reward_func_names), self.reward_weights, slice(start, start + len(prompts))),
        )
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        self.ext_reached.add("_generate_and_score_completions")
        nonfinite = self.ext_step.nonfinite
        rows, rewards = self._ext_scored
        fault = None if nonfinite == "ignore" else reward_fault(rewards.per_function, rewards.names, self.reward_funcs)
        if fault is not None:  # no plugin learns from such rewards either
            skip, step = nonfinite == "skip", self.ext_run.step() + 1
            output["advantages"] = without_faults(output["advantages"], fault, skip, step)
        elif self.ext_plugins.implements("advantages"):
            generations = self.num_generations if self.model.training else self.num_generations_eval
            finite = nonfinite == "raise"
            columns = [wanted.column for wanted in self.ext_columns.data]
            shaped = rollouts.shaped_advantages(self.ext_run, output, rows, rewards, generations, columns, finite)
            output["advantages"] = shaped
            self._ext_show_advantages(shaped, output)
        return output

    def _ext_show_advantages(self, advantages: Tensor, output: dict[str, Any]) -> None:
        """Put the advantages trained on into TRL's table of completions, which holds TRL's own so far. Collective."""
        shown = self.accelerator.gather(rollouts.per_completion(advantages, output)).tolist()
        table = self._logs["advantages"]
        for _ in range(min(len(shown), len(table))):  # it keeps no more than one generation batch
            table.pop()
        table.extend(shown)

    # -- loss --------------------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        return self.ext_loss.log_probs(super()._get_per_token_logps_and_entropies, *args, **kwargs)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if self.model.training:
            self.ext_reached.add("_compute_loss")
        return self.ext_loss.loss(super()._compute_loss, model, inputs)

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
            "steps_per_generation": args.steps_per_generation,
            "num_generations": args.num_generations,
            "num_iterations": args.num_iterations,
            "world_size": self.accelerator.num_processes,
            "beta > 0": args.beta != 0,
            "use_vllm": args.use_vllm,
            "vllm_importance_sampling_correction": args.vllm_importance_sampling_correction,
        }


__all__ = ["GRPOTrainer"]
