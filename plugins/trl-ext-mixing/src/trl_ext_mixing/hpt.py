"""HPT: reinforcement on the prompts that are solved often enough, imitation on the others, in one loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trl_ext import hookimpl
from trl_ext.records import AuxiliaryLoss, MicroStep, Rewards, Rollouts, RunDescription, SetupContext
from trl_ext_mixing.demonstrations import (
    Demonstration,
    Demonstrations,
    refuse_company,
    refuse_split_generations,
    refuse_unsupported,
)
from trl_ext_mixing.rewards import pass_rates, refuse_undecided

# Losses that TRL divides by tokens; the others it divides by completions. With the prompts of SFT at advantage 0, what
# is left is multiplied by all / kept, so that it is the mean over the rest. (bnpo counts tokens per micro-batch, where
# this holds on average.)
_PER_TOKEN = ("dapo", "bnpo", "cispo", "vespo")


@dataclass(eq=False, kw_only=True)
class HPT:
    """Per prompt: pass rate above gamma gives GRPO's loss, otherwise the log-likelihood of its demonstration.

    Both losses are means over their own tokens (or completions, as `loss_type` has it), so the share of prompts that go
    to SFT does not change the size of the RL loss. A KL term stays on all completions.

    Args:
        demonstrations: column of the GRPO data set with the demonstration of each prompt.
        gamma: highest pass rate in [0, 1) that still goes to SFT; published: 0 or 2/8.
        sft_coefficient: weight of the SFT loss.
        max_length: longest demonstration in tokens; not cut where None.
        reward: name of the reward function that says whether a completion solves its prompt; the weighted sum of all
            where empty.
        solved_at: value of that reward from which a completion counts as solved.
    """

    demonstrations: str = "completion"
    gamma: float = 0.0
    sft_coefficient: float = 1.0
    max_length: int | None = None
    reward: str = ""
    solved_at: float = 1.0

    requires_api: ClassVar[str] = "1"
    trainers: ClassVar[tuple[str, ...]] = ("grpo",)
    citation: ClassVar[str] = "Lv et al., Towards a Unified View of LLM Post-Training (HPT), arXiv:2509.04419"

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < 1:
            raise ValueError(f"hpt: gamma={self.gamma} is not in [0, 1)")
        if not self.sft_coefficient > 0:
            raise ValueError(f"hpt: sft_coefficient={self.sft_coefficient} is not above 0")
        self._source: Demonstrations | None = None
        self._demonstrations: list[Demonstration] = []
        self._tokens = 1.0
        self._micro_step = 0
        self._micro_steps = 1
        self._per_token = True
        self._template: Mapping[str, Any] = {}
        self._noted: list[tuple[float, float]] = []

    @hookimpl
    def check(self, run: RunDescription) -> None:
        refuse_company(run, "hpt")
        refuse_undecided(run, self.reward)
        refuse_unsupported(run, self.demonstrations, f"hpt: demonstrations={self.demonstrations!r}")
        refuse_split_generations(run)
        self._micro_steps = run.args.steps_per_generation
        self._per_token = run.args.loss_type in _PER_TOKEN
        self._template = run.args.chat_template_kwargs or {}

    @hookimpl
    def setup(self, context: SetupContext) -> None:
        self._source = Demonstrations(context, self.demonstrations, self.max_length, self._template)

    @hookimpl
    def advantages(self, rollouts: Rollouts, rewards: Rewards, advantages: Tensor) -> Tensor:
        if not rollouts.training or self._source is None:
            return advantages
        rates = pass_rates(rewards, rollouts.num_generations, self.reward, self.solved_at)
        to_sft = rates <= self.gamma
        self._demonstrations = list(self._source.of_prompts(rollouts, rewards, to_sft).values())
        self._micro_step = 0
        keep = ~to_sft.repeat_interleave(rollouts.num_generations)[rewards.local]
        sizes = rollouts.mask.sum(dim=1).double() if self._per_token else torch.ones_like(keep, dtype=torch.float64)
        counts = torch.stack(
            [sizes.sum(), (sizes * keep).sum(), sizes.new_tensor(sum(d.tokens for d in self._demonstrations))]
        )
        everything, kept, tokens = self._source.reduce(counts).tolist()
        self._tokens = max(tokens, 1.0)
        self._noted.append((float(rates.mean()), float(to_sft.float().mean())))
        factor = keep.to(advantages.dtype) * (everything / max(kept, 1.0))
        return advantages * (factor if advantages.dim() == 1 else factor.unsqueeze(1))

    @hookimpl
    def auxiliary_losses(self, micro_step: MicroStep) -> dict[str, AuxiliaryLoss]:
        # Always a term, for logging sums it over ranks; where this rank has no demonstration it is zero.
        value = micro_step.log_probs.sum() * 0
        source, mine = self._source, self._demonstrations[self._micro_step :: self._micro_steps]
        if source is not None and mine:
            # The core divides by micro-steps and averages over ranks; what is left is one mean over all label tokens.
            scale = self._micro_steps * source.context.world_size / self._tokens
            # In the dtype of the zero, since the log reduces the term over ranks.
            value = value + (source.nll_sum(mine) * (self.sft_coefficient * scale)).to(value.dtype)
        self._micro_step += 1
        return {"sft": AuxiliaryLoss(value, per="batch")}

    @hookimpl
    def metrics(self, mode: str) -> dict[str, float]:
        if mode != "train" or not self._noted:
            return {}
        rates, shares = zip(*self._noted, strict=True)
        self._noted.clear()
        dropped = 0.0 if self._source is None else float(self._source.dropped)
        return {
            "pass_rate": sum(rates) / len(rates),
            "sft_prompts": sum(shares) / len(shares),
            "dropped_demonstrations": dropped,
        }
