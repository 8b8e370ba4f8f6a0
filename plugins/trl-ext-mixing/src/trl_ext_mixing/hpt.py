"""HPT (arXiv:2509.04419, Hybrid Post-Training): each prompt has one of two losses, by its pass rate P.

    L = L_GRPO + beta L_SFT

    P >  gamma    L_GRPO: GRPO's loss on the prompt's completions, as a mean over these prompts
    P <= gamma    L_SFT: -log p of the prompt's demonstration, as a mean over the label tokens

The paper's pair (alpha, beta) of weights is (1, 0) or (0, beta) for each prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from trl_ext import hookimpl
from trl_ext.options import Range
from trl_ext.records import AuxiliaryLoss, MicroStep, Rewards, Rollouts, RunDescription
from trl_ext_mixing.company import AFTER_NEW_ADVANTAGES
from trl_ext_mixing.demonstrations import Demonstration
from trl_ext_mixing.run_checks import refuse_split_generations
from trl_ext_mixing.unsolved import UnsolvedPrompts

_PER_TOKEN = ("dapo", "bnpo", "cispo", "vespo")
"""Losses that TRL divides by tokens; the others it divides by completions. bnpo counts them per micro-batch, where
the mean over the kept ones holds on average only."""


@dataclass(eq=False, kw_only=True)
class HPT(UnsolvedPrompts):
    """Per prompt: pass rate above gamma gives GRPO's loss, otherwise the log-likelihood of its demonstration.

    Both losses are means over their own tokens (or completions, as `loss_type` has it), so the share of prompts that go
    to SFT does not change the size of the RL loss. A KL term stays on all completions. A prompt of which no completion
    was judged stays with GRPO.

    Args:
        gamma: highest pass rate in [0, 1) that still goes to SFT; published: 0 or 2/8, by model.
        sft_coefficient: weight of the SFT loss, the paper's beta.
        demonstrations, max_length, reward, solved_at: as in `UnsolvedPrompts`.
    """

    gamma: Annotated[float, Range(ge=0, lt=1)] = 0.0
    sft_coefficient: Annotated[float, Range(gt=0)] = 1.0

    method: ClassVar[str] = "hpt"
    in_the_loss: ClassVar[bool] = True
    after: ClassVar[Mapping[str, str]] = AFTER_NEW_ADVANTAGES
    citation: ClassVar[str] = "Lv et al., Towards a Unified View of LLM Post-Training (HPT), arXiv:2509.04419"
    cost: ClassVar[str] = "a forward and a backward of the demonstrations for unsolved prompts"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._demonstrations: list[Demonstration] = []
        self._label_tokens = 0.0
        self._micro_step = 0
        self._micro_steps = 1
        self._per_token = True

    # -- the rule ----------------------------------------------------------------------------------------------------

    @hookimpl
    def advantages(self, rollouts: Rollouts, rewards: Rewards, advantages: Tensor) -> Tensor:
        """Advantages (B,) or (B, T): 0 on the prompts that go to SFT, and scaled to the mean over the others."""
        if not rollouts.training:
            return advantages
        to_sft = self.pass_rates(rollouts, rewards) <= self.gamma  # False where nobody judged: NaN
        self.means.add(sft_prompts=to_sft.float().mean())
        self._demonstrations = list(self.source.of_prompts(rollouts, rewards, to_sft).values())
        self._micro_step = 0
        keep = ~to_sft.repeat_interleave(rollouts.num_generations)[rewards.local]
        factor = keep.to(advantages.dtype) * self._all_over_kept(rollouts.mask, keep)
        return advantages * (factor if advantages.dim() == 1 else factor.unsqueeze(1))

    @hookimpl
    def auxiliary_losses(self, micro_step: MicroStep) -> dict[str, AuxiliaryLoss]:
        """Loss (), beta times -log p summed over the label tokens of this micro-step's demonstrations; its denominator
        is the label tokens of all of the step's demonstrations on all ranks (arXiv:2509.04419, the SFT term)."""
        # Always a term, for logging sums it over ranks; where this rank has no demonstration it is zero.
        value = micro_step.log_probs.sum() * 0
        mine = self._demonstrations[self._micro_step :: self._micro_steps]
        # A forward of sharded weights gathers them, which takes all ranks; all know whether one has a demonstration.
        if self._label_tokens and (mine or self.source.context.sharded):
            # The core divides by micro-steps and averages over ranks; what is left is one mean over all label tokens.
            scale = self._micro_steps * self.source.context.world_size / self._label_tokens
            # In the dtype of the zero, since the log reduces the term over ranks.
            value = value + (self.source.nll_sum(mine) * (self.sft_coefficient * scale)).to(value.dtype)
        self._micro_step += 1
        return {"sft": AuxiliaryLoss(value, per="batch")}

    # -- denominators ------------------------------------------------------------------------------------------------

    @hookimpl
    def check(self, run: RunDescription) -> None:
        super().check(run)
        refuse_split_generations(run)
        self._micro_steps = run.args.steps_per_generation
        self._per_token = run.args.loss_type in _PER_TOKEN

    def _all_over_kept(self, mask: Tensor, keep: Tensor) -> float:
        """What makes TRL's mean over all completions the mean over the kept ones. Counts label tokens too. Collective.

        Args:
            mask: (B, T) tokens of this rank's completions that the loss sees.
            keep: (B,) bool: the completions that stay with GRPO.
        """
        sizes = mask.sum(dim=1).double() if self._per_token else torch.ones_like(keep, dtype=torch.float64)
        labels = sizes.new_tensor(sum(d.tokens for d in self._demonstrations))
        everything, kept, tokens = self.source.reduce(torch.stack([sizes.sum(), (sizes * keep).sum(), labels])).tolist()
        self._label_tokens = tokens
        return float(everything / max(kept, 1.0))
