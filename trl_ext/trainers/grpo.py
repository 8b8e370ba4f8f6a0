"""`GRPOTrainer`: TRL's, with the advantages, the policy term and auxiliary losses open to plugins."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import trl
from torch import Tensor, nn
from trl.trainer.utils import add_fused_lm_head

from trl_ext.checkpoints.files import State
from trl_ext.config import GRPOConfig
from trl_ext.engine.losses import add_auxiliary_losses
from trl_ext.engine.prompt_order import PromptSampler, check_order
from trl_ext.engine.token_weights import RolloutLogProbs, token_weights
from trl_ext.errors import PluginError
from trl_ext.records import MicroStep, PolicyTokens, Rewards, Rollouts
from trl_ext.trainers.mixin import TrainerMixin
from trl_ext.trainers.step import same_shape


class GRPOTrainer(TrainerMixin, trl.GRPOTrainer):
    """Drop-in for `trl.GRPOTrainer` with the hook points of `trl_ext.hookspecs`. Give it as for TRL, and in addition:

    Args:
        plugins: instances to activate after those that `args.plugins` names.
        streams: role to auxiliary SFT data set, in addition to those that `args.streams` names.
    """

    ext_kind = "grpo"
    ext_config_class = GRPOConfig

    _ext_rewards: tuple[Tensor, dict[str, Any]] | None = None
    _ext_log_probs: RolloutLogProbs | None = None
    _ext_stream_head: Any = None
    _ext_order: tuple[int, list[int]] | None = None
    """The epoch whose order of prompts was chosen last, and the order: an epoch that is resumed keeps its own."""

    # -- prompts -----------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(dataset)
        if not self.ext_plugins.implements("prompt_order"):
            return sampler
        self._ext_order = None  # a second `train()` begins with epoch 0 again
        rows = self.train_dataset if dataset is None else dataset
        return PromptSampler(sampler, partial(self._ext_choose_order, rows))

    def _ext_choose_order(self, prompts: Any, order: list[int], epoch: int) -> list[int]:
        if self._ext_order is None or self._ext_order[0] != epoch:
            check = partial(check_order, rows=len(prompts))
            order = self.ext_guard.chain("prompt_order", "order", list(order), check, prompts=prompts, epoch=epoch)
            self.ext_guard.agree()
            digest = hashlib.sha256(repr(order).encode()).hexdigest()
            if len(set(self.ext_gather(digest))) > 1:
                owners = " or ".join(name for name, _ in self.ext_plugins.calls("prompt_order"))
                raise PluginError(
                    f"plugin {owners} gave the ranks different orders in hook 'prompt_order' for epoch {epoch}: "
                    "groups would be torn apart; decide by what all ranks know"
                )
            self._ext_order = epoch, order
        return self._ext_order[1]

    # -- generation --------------------------------------------------------------------------------------------------

    def _generate(self, prompts: Any) -> Any:
        with self._ext_sampling():
            return super()._generate(prompts)

    def _ext_sampling(self) -> AbstractContextManager[None]:
        """In training, the weights that a plugin wants to sample with; evaluation has swapped its own already."""
        if self.model.training and not self._ext_swapped and self.ext_plugins.implements("sampling_weights"):
            context = self.ext_guard.exclusive("sampling_weights", None, weights=self.ext_weights)
            self.ext_guard.agree()
            if context is not None:
                return self.ext_deploy(context)
        return nullcontext()

    # -- advantages --------------------------------------------------------------------------------------------------

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._ext_rewards = rewards, {"inputs": inputs, "prompts": prompts, "completions": completions}
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if not self.ext_plugins.implements("advantages"):
            return output
        assert self._ext_rewards is not None
        per_function, rows = self._ext_rewards
        self._ext_rewards = None
        n = len(rows["prompts"])
        rank = self.accelerator.process_index
        mask = output["completion_mask"]
        rollouts = Rollouts(
            **rows,
            prompt_ids=output["prompt_ids"],
            prompt_mask=output["prompt_mask"],
            completion_ids=output["completion_ids"],
            mask=mask * output["tool_mask"] if "tool_mask" in output else mask,
            num_generations=self.num_generations if self.model.training else self.num_generations_eval,
            step=self.state.global_step,
            training=self.model.training,
            old_log_probs=output.get("old_per_token_logps"),
        )
        rewards = Rewards(
            per_function, tuple(self.reward_func_names), self.reward_weights, slice(rank * n, (rank + 1) * n)
        )
        shapes = ((n,), tuple(mask.shape))

        def check(result: Any) -> None:
            if not isinstance(result, Tensor) or tuple(result.shape) not in shapes:
                got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
                raise TypeError(f"returned {got}; expected advantages of shape {shapes[0]} or {shapes[1]}")

        output["advantages"] = self.ext_guard.chain(
            "advantages", "advantages", output["advantages"], check, rollouts=rollouts, rewards=rewards
        )
        self.ext_guard.agree()  # what follows is collective: streams, the loss of sharded weights
        return output

    # -- loss --------------------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if self._ext_log_probs is not None:
            return self._ext_log_probs.serve(super()._get_per_token_logps_and_entropies, *args, **kwargs)
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        owner = self.ext_plugins.owner("policy_loss")
        auxiliary = self.ext_plugins.implements("auxiliary_losses") and self.model.training
        if owner is None and not auxiliary:
            return super()._compute_loss(model, inputs)
        self._ext_log_probs = tap = RolloutLogProbs()
        try:
            loss = super()._compute_loss(model, inputs) if owner is None else self._ext_policy_loss(model, inputs)
        finally:
            self._ext_log_probs = None
        return self._ext_add_auxiliary(loss, tap, inputs) if auxiliary else loss

    def _ext_policy_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss with the clipped term replaced: the rest, plus TRL's token weights times the plugin's loss."""
        tap = self._ext_log_probs
        assert tap is not None
        advantages = inputs["advantages"]
        # With zero advantages TRL's loss is everything but the policy term, with metrics and reduction its own.
        rest = super()._compute_loss(model, {**inputs, "advantages": torch.zeros_like(advantages)})
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name in [name for name in metrics if "clip_ratio" in name]:
            del metrics[name]  # of a term that is not used
        log_probs, entropy = tap.log_probs, tap.entropy
        weights = token_weights(self, super()._compute_loss, inputs, tap)
        mask = self._ext_loss_mask(inputs)
        old = inputs.get("old_per_token_logps")
        tokens = PolicyTokens(
            log_probs=log_probs,
            old_log_probs=log_probs.detach() if old is None else old,
            advantages=(advantages.unsqueeze(1) if advantages.dim() == 1 else advantages).expand_as(log_probs),
            mask=mask,
            entropy=entropy.detach(),
            training=self.model.training,
            progress=self.ext_progress(),
            reference_log_probs=inputs.get("ref_per_token_logps"),
        )
        loss = self.ext_guard.exclusive("policy_loss", -log_probs, check=same_shape(log_probs), tokens=tokens)
        term = (weights * torch.where(mask, loss, torch.zeros_like(loss))).sum()
        if metrics.get("policy_loss"):
            # TRL logs it where an entropy bonus is on; so far without this term, and before accumulation's share.
            by_token = self.loss_type in ("cispo", "dapo", "vespo") or not self.model.training
            logged = term.detach() * (1 if by_token else self.current_gradient_accumulation_steps)
            metrics["policy_loss"][-1] += self.accelerator.gather(logged).nanmean().item()
        return rest + term

    @staticmethod
    def _ext_loss_mask(inputs: dict[str, Any]) -> Tensor:
        mask = inputs["completion_mask"]
        return (mask * inputs["tool_mask"] if "tool_mask" in inputs else mask).bool()

    def _ext_add_auxiliary(self, loss: Tensor, tap: RolloutLogProbs, inputs: dict[str, Any]) -> Tensor:
        step = MicroStep(
            inputs=inputs,
            log_probs=tap.log_probs,
            entropy=tap.entropy,
            mask=self._ext_loss_mask(inputs),
            step=self.state.global_step,
            progress=self.ext_progress(),
        )
        accumulation = self.current_gradient_accumulation_steps
        # TRL counts the tokens of a whole generation batch; one accumulation window has its share of them.
        tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        return add_auxiliary_losses(
            self,
            loss,
            step,
            per_token=tokens * accumulation / self.args.steps_per_generation,
            per_sequence=len(inputs["completion_ids"]) * accumulation,
            per_batch=accumulation,
        )

    # -- streams -----------------------------------------------------------------------------------------------------

    @contextmanager
    def ext_sft_head(self) -> Iterator[None]:
        """GRPO's head divides logits by the sampling temperature; SFT data wants them as they are.

        The heads are exchanged beneath the mixed precision that accelerate has put around the model's forward, so it is
        put around this one too.
        """
        base = self.ext_base_model()
        policy_head = base.forward
        if self._ext_stream_head is None:
            outputs = dict.fromkeys(("log_probs", "entropy", *self.ext_fused_outputs))
            add_fused_lm_head(base, cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32, outputs=tuple(outputs))
            self._ext_stream_head = base.forward
        base.forward = self._ext_stream_head
        try:
            with self.accelerator.autocast():
                yield
        finally:
            base.forward = policy_head

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def ext_rank_state(self) -> State:
        """The rollouts still to be trained on too: TRL does not save them, and a run resumed amid them would differ."""
        state = super().ext_rank_state()
        state["grpo_step"] = self._step
        if self._ext_order is not None:
            state["prompt_epoch"], state["prompt_order"] = self._ext_order[0], torch.tensor(self._ext_order[1])
        if self._buffered_inputs is not None:
            for i, batch in enumerate(self._buffered_inputs):
                state.update({f"rollouts.{i}.{key}": value for key, value in batch.items() if value is not None})
        return state

    def ext_load_rank_state(self, rank_state: State) -> None:
        super().ext_load_rank_state(rank_state)
        self._step = rank_state["grpo_step"]
        if "prompt_order" in rank_state and not self.args.reset_plugin_state:
            self._ext_order = rank_state["prompt_epoch"], rank_state["prompt_order"].tolist()
        batches: dict[int, dict[str, Any]] = {}
        for name, value in rank_state.items():
            if name.startswith("rollouts."):
                _, i, key = name.split(".", 2)
                batches.setdefault(int(i), {})[key] = self._prepare_input(value)
        self._buffered_inputs = [batches[i] for i in sorted(batches)] or None


__all__ = ["GRPOTrainer"]
