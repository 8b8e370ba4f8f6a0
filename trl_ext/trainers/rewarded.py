"""What GRPO and RLOO share: rewards and advantages, the policy term, and auxiliary losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from trl_ext.engine import rollouts
from trl_ext.engine.finite_rewards import nan_as_infinite, reward_fault, without_faults
from trl_ext.engine.grpo_loss import GRPOLoss
from trl_ext.records import Rewards
from trl_ext.startup.plan import RunPlan
from trl_ext.trainers.sampling import SamplingMixin


class RewardedMixin(SamplingMixin):
    """Opens a trainer whose completions are rewarded, and whose loss is linear in their advantages."""

    ext_called_from = {
        "policy_loss": "_compute_loss",
        "auxiliary_losses": "_compute_loss",
        "advantages": "_generate_and_score_completions",
    }
    ext_other_terms: ClassVar[Mapping[str, Any]]
    """Attributes of TRL's trainer that switch off the terms of its loss beside the policy term, with their values."""
    ext_per_token: ClassVar[bool]
    """Whether the loss takes one advantage per token too."""

    reward_funcs: list[Any]
    ext_entropy: rollouts.OldEntropy | None
    """Gives the entropy of completions, where a plugin wants it."""
    _ext_scored: tuple[dict[str, Any], Rewards]
    """Rows and rewards of the generation batch at hand."""

    def _ext_open(self, plan: RunPlan) -> None:
        super()._ext_open(plan)
        self.ext_loss = GRPOLoss(
            self.ext_run,
            policy_term_alone=self._ext_policy_term_alone,
            metrics=lambda: self._metrics["train" if self.model.training else "eval"],
            gather=self.accelerator.gather,
            loss_type=getattr(self, "loss_type", None),
            window=self.ext_step.window,
            window_batches=self._ext_window_batches,
            scaled=bool(self.loss_is_scaled_for_ga),
        )
        wanted = {name for plugin in self.ext_plugins for name in plugin.declared.rollout_outputs}
        self.ext_entropy = rollouts.OldEntropy() if "entropy" in wanted else None
        if self.ext_step.nonfinite != "ignore":
            self.reward_funcs = [nan_as_infinite(function) for function in self.reward_funcs]

    def _ext_window_batches(self) -> list[dict[str, Any]] | None:
        assert self._buffered_inputs is not None, "generated before the window's first loss"
        done, accumulation = self.ext_step.window.done, self.current_gradient_accumulation_steps
        return rollouts.window_batches(self._buffered_inputs, self._step, done, accumulation, self.args.num_iterations)

    @contextmanager
    def _ext_policy_term_alone(self) -> Iterator[None]:
        apart = {"_metrics": {mode: type(kept)(list) for mode, kept in self._metrics.items()}}
        saved = {name: getattr(self, name) for name in (*self.ext_other_terms, *apart)}
        self.__dict__.update({**self.ext_other_terms, **apart})
        try:
            yield
        finally:
            self.__dict__.update(saved)

    # -- completions and rewards -------------------------------------------------------------------------------------

    def _generate(self, prompts: Any) -> Any:
        self.ext_reached.discard("_generate_and_score_completions")
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
        with self.ext_entropy.scoring() if self.ext_entropy else nullcontext():
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
            columns = [wanted.column for wanted in self.ext_columns.data]
            shaped = rollouts.shaped_advantages(
                self.ext_run,
                output,
                rows,
                rewards,
                generations,
                columns,
                finite=nonfinite == "raise",
                per_token=self.ext_per_token,
                entropy=self._ext_entropy_of(output),
            )
            output["advantages"] = shaped
            self._ext_show_advantages(shaped, output)
        return output

    def _ext_entropy_of(self, output: dict[str, Any]) -> Tensor | None:
        if self.ext_entropy is None:
            return None
        args, forward = self.args, super()._get_per_token_logps_and_entropies
        rows = args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size
        return self.ext_entropy.of(output, forward, self.model, rows)

    def _ext_show_advantages(self, advantages: Tensor, output: dict[str, Any]) -> None:
        """Put the advantages trained on into TRL's table of completions, which holds TRL's own so far. Collective."""
        shown = self.accelerator.gather(rollouts.per_completion(advantages, output)).tolist()
        table = self._logs["advantages"]
        for _ in range(min(len(shown), len(table))):  # it keeps no more than one generation batch
            table.pop()
        table.extend(shown)

    # -- loss --------------------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        forward = super()._get_per_token_logps_and_entropies
        if self.ext_entropy:
            forward = partial(self.ext_entropy.log_probs, forward)
        return self.ext_loss.log_probs(forward, *args, **kwargs)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if self.model.training:
            self.ext_reached.add("_compute_loss")
        return self.ext_loss.loss(super()._compute_loss, model, inputs)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _ext_schedule(self) -> dict[str, Any]:
        args = self.args
        return super()._ext_schedule() | {
            "steps_per_generation": args.steps_per_generation,
            "num_generations": args.num_generations,
            "num_iterations": args.num_iterations,
            "beta > 0": args.beta != 0,
        }
