"""What the methods that imitate unsolved prompts share: which prompts those are, and their demonstrations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from torch import Tensor

from trl_ext import hookimpl
from trl_ext.options import Range
from trl_ext.records import Rewards, Rollouts, RunDescription, SetupContext
from trl_ext_mixing.company import MIXING, ONE_AT_A_TIME
from trl_ext_mixing.demonstrations import Demonstrations
from trl_ext_mixing.means import Means
from trl_ext_mixing.pass_rates import pass_rates, summary
from trl_ext_mixing.run_checks import refuse_missing_column, refuse_undecided_reward, refuse_without_own_forward


@dataclass(eq=False, kw_only=True)
class UnsolvedPrompts:
    """Base of the methods that take a demonstration of a prompt whose completions solve it too seldom.

    A completion for which the deciding reward function gives None is neither solved nor failed: the pass rate is over
    the completions that were judged. A prompt without any is not imitated. It stays with GRPO, where TRL gives
    completions that nobody judged an advantage of 0; the log has the share of such prompts as `unjudged_prompts`.

    Args:
        demonstrations: column of the GRPO data set with the demonstration of each prompt.
        max_length: longest demonstration in tokens; not cut where None.
        reward: name of the reward function that says whether a completion solves its prompt; the weighted sum of all
            where empty.
        solved_at: value of that reward from which a completion counts as solved.
    """

    demonstrations: str = "completion"
    max_length: Annotated[int, Range(ge=2)] | None = None
    reward: str = ""
    solved_at: float = 1.0

    method: ClassVar[str]
    requires_api: ClassVar[str] = "1"
    trainers: ClassVar[tuple[str, ...]] = ("grpo",)
    provides: ClassVar[tuple[str, ...]] = (MIXING,)
    conflicts: ClassVar[Mapping[str, str]] = ONE_AT_A_TIME
    in_the_loss: ClassVar[bool] = False
    """Whether the demonstrations' forward is part of the trainer's loss on all ranks alike, as FSDP2 allows."""

    def __post_init__(self) -> None:
        self.source: Demonstrations
        self.means = Means()
        self._template: Mapping[str, Any] = {}

    @hookimpl
    def check(self, run: RunDescription) -> None:
        setting = f"{self.method}: demonstrations={self.demonstrations!r}"
        refuse_undecided_reward(run, self.reward)
        refuse_without_own_forward(run, setting, in_the_loss=self.in_the_loss)
        refuse_missing_column(run, self.demonstrations, setting)
        self._template = run.args.chat_template_kwargs or {}

    @hookimpl
    def setup(self, context: SetupContext) -> None:
        self.source = Demonstrations(context, self.demonstrations, self.max_length, self._template)

    @hookimpl
    def metrics(self, mode: str) -> dict[str, float]:
        if mode != "train":
            return {}
        return self.means.read() | {"dropped_demonstrations": float(self.source.dropped)}

    def pass_rates(self, rollouts: Rollouts, rewards: Rewards) -> Tensor:
        """(prompts of all ranks,) float, and noted for the log; NaN where no completion was judged."""
        rates = pass_rates(rewards, rollouts.num_generations, self.reward, self.solved_at)
        self.means.add(**summary(rates))
        return rates
